"""Situations of GPUs, whose driver is a shell script; the build is for the CPU, so serve is dry."""

import os
import shutil

from tests.proof.hints.doctor_situations import driver, program
from tests.proof.hints.following import User, runs
from tests.proof.hints.serve_situations import serving, started
from workspace.machine import hardware

CARDS = """case "$*" in
*compute_cap*) {gpus};;
*memory.total*) {memories};;
*compute-apps*) {processes};;
*uuid*) echo GPU-a; echo GPU-b;;
-L) echo 'GPU 0: NVIDIA L4';;
esac"""


def card(user: User, *memories: str, names: tuple[str, ...] = (), processes: str = "true") -> None:
    """Let a driver answer for GPUs with these total and free MiB."""
    user.world.env["DEVICE"] = "cuda"
    names = names or ("NVIDIA L4",) * len(memories)
    gpus = "; ".join(f"echo '{name}, 8.9, 580.95.05'" for name in names)
    shown = "; ".join(f"echo '{memory}'" for memory in memories)
    program(user, "nvidia-smi", CARDS.format(gpus=gpus, memories=shown, processes=processes))


@runs("server.gpus", "server.gpu_order", "server.recipes_fit", "server.end_processes",
      "server.less_memory", "server.utilization_least")  # fmt: skip
def models_that_do_not_fit_a_gpu(user: User) -> None:
    model = str(serving(user))
    verb = ("serve", "tiny", "--dry-run")
    again = {"serve tiny": "serve --dry-run tiny"}
    card(user, "24000, 23000")
    user.look("server.gpus", *verb, "--", "--tensor-parallel-size", "2", shows="NVIDIA L4")
    user.follow("server.utilization_least", *verb, "--", "--gpu-memory-utilization", "0.02",
                put=again, then=False)  # fmt: skip
    user.follow("server.less_memory", *verb, "--", "--gpu-memory-utilization", "0.99",
                put=again, then=False)  # fmt: skip
    card(user, "24000, 100")
    user.look("server.recipes_fit", *verb, shows="tiny")
    card(user, "24000, 100", processes=f"echo '{os.getpid()}, pytest, 20000'")
    user.look("server.end_processes", *verb, shows=str(os.getpid()))
    card(user, "24000, 23000", "48000, 47000", names=("NVIDIA L4", "NVIDIA L40"))
    user.follow("server.gpu_order", "serve", model, "--dry-run")


@runs("server.drop_caches")
def model_for_which_the_page_cache_has_to_go(user: User) -> None:
    model = str(serving(user))
    user.world.env["DEVICE"] = "cuda"
    driver(user)
    host = hardware.observe()
    cached = hardware.droppable_gib(hardware.read_meminfo())
    share = (host.available_gib - cached / 2) / host.memory_gib
    verb = ("serve", model, "--dry-run", "--", "--gpu-memory-utilization", f"{share:.3f}")
    command = user.meets("server.drop_caches", *verb)
    assert command == "./scripts/inv drop-caches"
    # Not the cache of the machine that runs the tests.
    harmless = program(user, "sysctl", "exit 0")
    sysctl = shutil.which("sysctl", path=os.pathsep.join(hardware.ROOT_PATH))
    user.mounts(f"mount --bind {harmless} {sysctl}")
    done = user.type(f"{command} --yes")
    assert (done.code, "freed" in done.err) == (0, True), done.output
    user.followed.add("server.drop_caches")


@runs("server.or_force")
def cache_for_which_a_start_has_no_room(user: User) -> None:
    serving(user)
    most = int(hardware.observe().memory_gib)
    with started(user) as verb:
        user.world.layout.dotenv.write_text(f"VLLM_CPU_KVCACHE_SPACE={most}\n")
        user.follow("server.or_force", *verb, then=True)
