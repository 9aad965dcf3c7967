"""The pin's own CUDA target, built through `inv rebuild` for a GB10 without a GPU: planned,
interrupted, resumed, and again for one unit.

Needs nvcc, the package index, upstream's external sources or EXTERNALS_MIRROR, and 8 GB of disk; on
two cores it takes about half an hour.
"""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.proof.kill.real import Clone, make_clone
from workspace.install import stamp

TARGET = "_moe_C_stable_libtorch"
SOURCE = "csrc/libtorch_stable/moe/topk_softmax_kernels.cu"
LIMIT_S = 3600.0


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("cuda")
    made = make_clone(folder)
    made = replace(made, env={**made.env, "TORCH_CUDA_ARCH_LIST": "12.1a"})
    inv(made, "bootstrap", "--device", "cuda")
    yield made
    shutil.rmtree(folder, ignore_errors=True)


def test_one_changed_kernel_compiles_its_target_and_the_next_change_one_unit(clone: Clone) -> None:
    precompiled_wheel = libraries(clone)
    edit(clone, "one")
    units = planned(clone)
    assert units > 20

    # ^C in the middle: no compiler is left, the tree is unchanged, and the next run resumes.
    child = replace(clone, args=("rebuild",)).start()
    wait_for_objects(clone, least=2)
    assert clone.end(child, signal.SIGINT)[0] == 130, clone.output[-2000:]
    assert libraries(clone) == precompiled_wheel
    left = planned(clone)
    assert 0 < left < units

    began = time.monotonic()
    assert re.search(r"\d (has|have) code for 12\.1a", inv(clone, "rebuild")), clone.output[-2000:]
    whole_s = time.monotonic() - began
    changed = {
        path for path, digest in libraries(clone).items() if precompiled_wheel.get(path) != digest
    }
    assert changed == {f"vllm/{TARGET}.abi3.so"}, "the rest is the precompiled wheel's"

    edit(clone, "two")
    assert planned(clone) == 1
    began = time.monotonic()
    inv(clone, "rebuild")
    one_s = time.monotonic() - began
    assert "nothing to do" in inv(clone, "rebuild")
    print(
        f"\nkernels: {TARGET} for 12.1a: {left} of {units} units after ^C in {whole_s:.0f} s; then"
        f" one unit and the link in {one_s:.0f} s"
    )


def inv(clone: Clone, *args: str) -> str:
    child = replace(clone, args=args).start()
    assert child.wait(timeout=LIMIT_S) == 0, clone.output[-4000:]
    return clone.output


def planned(clone: Clone) -> int:
    """Return the units that the next rebuild would compile, all of the one target that the change
    reaches.
    """
    argv = [clone.layout.root / "scripts" / "inv", "rebuild", "--plan", "--json"]
    output = subprocess.run(
        argv,
        env=clone.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    ).stdout
    plan = json.loads(output)
    assert [row["target"] for row in plan["rows"]] == [TARGET]
    return plan["units"]


def libraries(clone: Clone) -> dict[str, str]:
    recorded = stamp.read(clone.layout.stamp("vllm"))
    assert recorded is not None
    return {library.path: library.sha256 for library in recorded.libraries}


def edit(clone: Clone, text: str) -> None:
    source = clone.layout.vllm / SOURCE
    source.write_text(
        re.sub(r"\n// proof: .*\n", "\n", source.read_text()) + f"\n// proof: {text}\n"
    )


def wait_for_objects(clone: Clone, *, least: int) -> None:
    """Wait until so many units are compiled. The largest start first, so on few cores it takes
    minutes.
    """
    until = time.monotonic() + LIMIT_S
    while len(list(clone.layout.builds.glob(f"cuda-*/CMakeFiles/{TARGET}.dir/**/*.o"))) < least:
        assert time.monotonic() < until, clone.output[-2000:]
        time.sleep(0.2)
