"""Situations of a rebuild, of wheels and of Triton."""

import os
import re
from pathlib import Path

from tests.bench.materials import record
from tests.proof.hints.following import User, runs
from tests.proof.hints.machine_situations import measured


@runs("compile.jobs_auto", "compile.memory_auto", "compile.plan_targets", "install.rebuild_auto")
def flags_of_a_rebuild_that_are_wrong(user: User) -> None:
    user.follow("compile.jobs_auto", "rebuild", "--jobs", "x", then=False)
    user.follow("compile.memory_auto", "rebuild", "--memory", "x", then=False)
    user.look("compile.plan_targets", "rebuild", "--target", "nope", shows="")
    user.follow("install.rebuild_auto", "rebuild", "--kernels", "nope", then=False)


@runs("inv.rebuild")
def source_of_a_kernel_that_was_edited(user: User) -> None:
    source = user.vllm / "csrc" / "cpu" / "answer.c"
    source.write_text(source.read_text().replace("42", "43"))
    user.follow("inv.rebuild", "status")
    assert user.world.status()["kernels"] == "ok"


@runs("install.use_wheel")
def wheel_of_another_clone(user: User) -> None:
    user.follow("install.use_wheel", "wheel", then=False)
    assert user.world.status()["install"] == "ok"


def torch_cache_of_another(user: User) -> Path:
    """Let TorchInductor have a cache that another torch wrote, and return it."""
    cache = user.world.folder / "tmp" / "torchinductor_root"
    cache.mkdir(parents=True)
    user.world.env["TMPDIR"] = str(cache.parent)
    user.world.env["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    (cache / "old.py").write_text("old")
    os.utime(cache / "old.py", (1, 1))
    os.utime(cache, (1, 1))
    return cache


@runs("install.fix_what_can")
def triton_that_has_a_fault(user: User) -> None:
    torch_cache_of_another(user)
    user.follow("install.fix_what_can", "fix-triton", "--check", then=False)


@runs("bench.report_of_two")
def report_of_one_record(user: User) -> None:
    one, two = measured(user, record(label="one")), measured(user, record(label="two"))
    command = user.meets("bench.report_of_two", "bench.report", "--first", one)
    done = user.type(command.replace(" A ", f" {one} ").replace(" B", f" {two}"))
    assert done.code == 0, done.output
    assert Path(done.out.strip()).exists(), done.output
    user.followed.add("bench.report_of_two")


@runs("machine.drop_from_dotenv")
def setting_that_another_device_does_not_take(user: User) -> None:
    user.world.layout.dotenv.write_text("VLLM_CPU_KVCACHE_SPACE=3\n")
    command = user.meets("machine.drop_from_dotenv", "bootstrap", "--device", "cuda")
    assert user.type(command).code == 0
    lines = user.world.layout.dotenv.read_text().splitlines()
    assert "# VLLM_CPU_KVCACHE_SPACE=3" in lines, lines
    assert "VLLM_CPU_KVCACHE_SPACE=3" not in lines
    user.followed.add("machine.drop_from_dotenv")


@runs("machine.set_url")
def remote_that_no_mirror_stands_for(user: User) -> None:
    mirror = user.world.materials.upstream.as_uri()
    user.follow("machine.set_url", "doctor", put={"=URL": f"={mirror}"}, then=False)
    assert mirror in user.world.layout.dotenv.read_text()


@runs("core.git_status")
def tree_without_its_command_line(user: User) -> None:
    # The small vLLM has none.
    user.look("core.git_status", "serve", "tiny", "--dry-run", shows="nothing to commit")


@runs("compile.one_job", "compile.then_resume", "compile.disk_then_resume")
def builds_that_lack_something(user: User) -> None:
    """The compiler prints what a compiler prints that lacks memory, a toolkit, or room."""
    source = user.vllm / "csrc" / "cpu" / "answer.c"
    text = source.read_text()
    for number, (name, printed, shows) in enumerate(
        (
            ("compile.one_job", "cc1plus: out of memory allocating 9 bytes", "1 compiler at once"),
            ("compile.then_resume", "Unsupported gpu architecture 'compute_121a'", "ok +compiler"),
            ("compile.disk_then_resume", "error writing: No space left on device", "Avail"),
        ),
        43,
    ):
        source.write_text(f'{text}\n#error "{printed}"\n')
        command = user.meets(name, "rebuild")
        source.write_text(text.replace("42", str(number)))
        done = user.type(command)
        assert done.code == 0, done.output
        assert re.search(shows, done.output), done.output
        again = user.inv("rebuild")
        assert (again.code, user.world.status()["kernels"]) == (0, "ok"), again.output
        user.followed.add(name)


@runs("compile.resume", "compile.doctor_compilers", "compile.check_place")
def builds_that_fail(user: User) -> None:
    source, cmake = user.vllm / "csrc" / "cpu" / "answer.c", user.vllm / "CMakeLists.txt"
    text, lists = source.read_text(), cmake.read_text()
    source.write_text(f"{text}\nint broken(\n")
    command = user.meets("compile.resume", "rebuild")
    source.write_text(text.replace("42", "43"))
    done = user.type(command)
    assert (done.code, user.world.status()["kernels"]) == (0, "ok"), done.output
    user.followed.add("compile.resume")
    for name, reason, shows in (
        ("compile.doctor_compilers", "CMAKE_CXX_COMPILER is wrong", r"ok +compiler"),
        ("compile.check_place", "it is wrong", r"CMakeLists\.txt"),
    ):
        cmake.write_text(f'{lists}\nmessage(FATAL_ERROR "{reason}")\n')
        user.look(name, "rebuild", shows=shows)
