"""The build of Triton from source, on the small one: real git, CMake, ninja and compilers, its
downloads from a folder that stands for the network.
"""

import functools
import http.server
import json
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.small import tritons
from tests.small.materials import git
from tests.small.tritons import Upstream
from tests.small.wheels import write
from tests.small.world import World

SLOW = """#!/bin/sh
case "$*" in *second.cpp*) [ -e "{gate}" ] || {{ echo > "{gate}"; sleep 60; }};; esac
exec c++ "$@"
"""
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


@pytest.fixture
def upstream(built: World, tmp_path: Path) -> Upstream:
    return tritons.make(built, tmp_path)


def answer(world: World) -> str:
    return world.python("import triton; print(triton._library.triton_small_answer())")


def build(world: World, *args: str) -> str:
    ended = world.run("fix-triton", "--from-source", *args)
    assert ended.code == 0, ended.output
    return ended.err


def installed(world: World) -> dict[str, tuple[int, int]]:
    """Return inode and time of each file of the installed Triton, without bytecode."""
    return {
        name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in world.layout.environment.glob("lib/*/site-packages/triton*/**/*.*")
        if path.suffix != ".pyc" and (name := str(path))
    }


def log(world: World, index: int) -> str:
    return sorted(world.layout.logs.glob("*fix-triton.log"))[index].read_text()


@pytest.mark.parametrize("layout", ["root", "python"])
def test_built_installed_proven_and_kept_by_all_that_comes_after(
    built: World, tmp_path: Path, layout: str
) -> None:
    upstream = tritons.make(built, tmp_path, layout=layout)
    build(built, "--jobs", "2")
    version = f"3.9.0+git{upstream.pinned[:8]}"
    record = json.loads(built.layout.stamp("triton").read_text())
    assert (record["inputs"]["commit"], record["inputs"]["ref"], record["outcome"]["version"]) == (
        upstream.pinned,
        "main",
        version,
    )
    assert "compiled for sm_121a" in record["outcome"]["kernel"]
    assert git(built.layout.triton, "status", "--porcelain", "--ignored") == "", (
        "the tree is as git made it"
    )
    assert answer(built) == "42"
    assert f"{version} built here from {upstream.pinned[:12]} (main)" in built.run("status").out
    built.layout.stamp("environment").unlink()
    assert f"triton {version} (installed on purpose, kept)" in built.bootstrap().err
    assert "nothing to do" in built.bootstrap().err
    assert answer(built) == "42"


def test_second_build_compiles_what_changed_and_a_ref_moves_the_pin(
    built: World, upstream: Upstream
) -> None:
    assert " 3 units" not in build(built)
    git(upstream.tree, "checkout", "--quiet", "-b", "next", upstream.pinned)
    (upstream.tree / "src" / "second.cpp").write_text(
        'extern "C" int triton_small_second() { return 3; }\n'
    )
    git(upstream.tree, "commit", "--quiet", "--all", "-m", "Three")
    new = git(upstream.tree, "rev-parse", "HEAD")
    output = build(built, "--ref", "next")
    # second.cpp and the link.
    assert " 2 units, " in output
    assert "downloading" not in log(built, -1)
    assert built.python("import triton; print(triton._library.triton_small_second())") == "3"
    assert f'commit = "{new}"' in built.layout.pins.read_text()
    assert json.loads(built.layout.stamp("triton").read_text())["inputs"] | {"tree": ""} == {
        "commit": new,
        "ref": "next",
        "tree": "",
        "patches": "",
        "torch": "2.13.0+cpu",
    }
    assert len(tritons.builds(built)) == 1


def test_module_that_the_tree_no_longer_has_does_not_come_along_in_the_second_wheel(
    built: World, upstream: Upstream
) -> None:
    git(upstream.tree, "checkout", "--quiet", "-b", "more", upstream.pinned)
    (upstream.tree / "python" / "triton" / "extra.py").touch()
    git(upstream.tree, "add", "--all")
    git(upstream.tree, "commit", "--quiet", "-m", "More")
    build(built, "--ref", "more")
    assert built.python("import triton.extra; print(1)") == "1"
    build(built, "--ref", "main")
    assert (
        built.python("import importlib.util; print(importlib.util.find_spec('triton.extra'))")
        == "None"
    )


def test_patches_on_triton_are_in_what_is_built(built: World, upstream: Upstream) -> None:
    git(upstream.tree, "checkout", "--quiet", "--detach", upstream.pinned)
    (upstream.tree / "src" / "second.cpp").write_text(
        'extern "C" int triton_small_second() { return 9; }\n'
    )
    git(upstream.tree, "commit", "--quiet", "--all", "-m", "Nine\n\nUpstream-Status: Pending")
    args = (
        "format-patch",
        "--stdout",
        "--zero-commit",
        "--full-index",
        "--no-signature",
        "--keep-subject",
        "-1",
    )
    folder = built.layout.patches("triton")
    (folder / "Nine.patch").write_text(git(upstream.tree, *args) + "\n")
    (folder / "series").write_text(
        f"# patches on Triton, in order\n# base: {upstream.pinned}\nNine.patch\n"
    )
    build(built)
    assert built.python("import triton; print(triton._library.triton_small_second())") == "9"
    assert "and 1 patch;" in built.run("status").out


def test_one_that_compiles_wrongly_is_not_installed_and_the_former_stays_as_it_is(
    built: World, upstream: Upstream
) -> None:
    build(built)
    stamped, files = built.layout.stamp("triton").read_bytes(), installed(built)
    sentence = built.run("fix-triton", "--from-source", "--ref", "broken").error(7)
    assert "the test kernel fails: RuntimeError: a wrong answer" in sentence
    assert (installed(built), built.layout.stamp("triton").read_bytes()) == (files, stamped)
    assert answer(built) == "42"
    assert built.status()["environment"] == "ok"
    assert list(built.layout.state.glob("triton-*")) == []


def test_error_of_a_compiler_is_named_and_the_former_was_never_touched(
    built: World, upstream: Upstream
) -> None:
    tritons.install_former(built)
    ended = built.run("fix-triton", "--from-source", "--ref", "dead")
    assert "first.cpp" in ended.error(7)
    assert "was not declared in this scope" in ended.error(7)
    assert built.python("import triton; print(triton.__version__)") == "3.7.1"


def test_interrupt_ends_the_compilers_and_the_next_run_resumes(
    built: World, upstream: Upstream, tmp_path: Path
) -> None:
    gate, slow = tmp_path / "gate", tmp_path / "slow-c++"
    slow.write_text(SLOW.format(gate=gate))
    slow.chmod(0o755)
    child = built.start("fix-triton", "--from-source", env={"CXX": str(slow)})
    deadline = time.monotonic() + 60
    while not gate.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, "interrupted" in err, "Traceback" in err) == (130, True, False), (
        err + out
    )
    assert not any(
        b"second.cpp" in path.read_bytes()
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists()
    )
    built.env["CXX"] = str(slow)
    assert " 8 units" not in build(built)
    assert answer(built) == "42"


def test_no_such_ref_changes_nothing(built: World, upstream: Upstream) -> None:
    before = built.layout.pins.read_bytes()
    assert "has no branch nowhere" in built.run(
        "fix-triton", "--from-source", "--ref", "nowhere"
    ).error(11)
    assert built.layout.pins.read_bytes() == before
    assert tritons.builds(built) == []


def test_without_a_network_the_error_is_the_networks_and_a_folder_replaces_it(
    built: World, upstream: Upstream
) -> None:
    del built.env["TRITON_DOWNLOADS_MIRROR"]
    ended = built.run("fix-triton", "--from-source", through=("unshare", "-n"))
    assert "cannot download a file: urllib.error.URLError" in ended.error(11)
    assert "TRITON_DOWNLOADS_MIRROR=/a/folder" in ended.err
    assert "LLVM_SYSPATH=/a/folder" in ended.err
    built.env["TRITON_DOWNLOADS_MIRROR"] = str(upstream.network)
    ended = built.run("fix-triton", "--from-source", through=("unshare", "-n"))
    assert ended.code == 0, ended.output


def test_file_that_the_mirror_lacks_is_named_and_the_files_may_lie_side_by_side(
    built: World, upstream: Upstream, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    built.env["TRITON_DOWNLOADS_MIRROR"] = str(flat)
    sentence = built.run("fix-triton", "--from-source").error(11)
    assert f"{flat}/llvm-62b7cf96" in sentence
    for path in upstream.network.rglob("*-*"):
        if path.is_file():
            path.rename(flat / path.name)
    next(upstream.network.rglob("include.zip")).rename(flat / "include.zip")
    build(built)


def test_mirror_may_be_an_address(built: World, upstream: Upstream) -> None:
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(upstream.network))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        built.env["TRITON_DOWNLOADS_MIRROR"] = f"http://127.0.0.1:{server.server_address[1]}"
        build(built)
        server.shutdown()
    assert log(built, -1).count("downloading and extracting https://") == 5


def test_triton_is_built_from_source_where_the_paired_wheel_does_not_help(
    built: World, upstream: Upstream, tmp_path: Path
) -> None:
    """The index's stand-in for 3.7.1 is an empty module that compiles nothing."""
    files = {
        "torch/__init__.py": b"from torch import version\n",
        "torch/version.py": b"__version__ = '2.13.0'\ncuda = '13.0'\n",
    }
    built.uv(
        "install",
        "--no-deps",
        "--reinstall-package",
        "torch",
        str(write(tmp_path, "torch", "2.13.0", files, requires=("triton==3.7.1",))),
    )
    ended = built.run("fix-triton")
    assert ended.code == 0, ended.output
    steps = [
        ended.err.index(args)
        for args in (
            "torch compiles its kernels with Triton",
            "done     wheel",
            "no cheaper fix has helped",
            "done     verify",
        )
    ]
    assert steps == sorted(steps)
    assert answer(built) == "42"


def test_offline_switch_needs_local_folders_and_builds_with_them(
    built: World, upstream: Upstream, tmp_path: Path
) -> None:
    (tmp_path / "llvm" / "include" / "llvm").mkdir(parents=True)
    (tmp_path / "llvm" / "include" / "llvm" / "small.h").write_text("#define SMALL_LLVM 40\n")
    built.env |= {"TRITON_OFFLINE_BUILD": "1", "TRITON_DOWNLOADS_MIRROR": str(tmp_path / "nowhere")}
    assert "LLVM_SYSPATH and JSON_SYSPATH" in built.run("fix-triton", "--from-source").error(2)
    built.env |= {"LLVM_SYSPATH": str(tmp_path / "llvm"), "JSON_SYSPATH": str(tmp_path / "llvm")}
    build(built)


def test_environment_that_cannot_be_written_is_reported_before_any_download(
    built: World, upstream: Upstream
) -> None:
    ended = built.run(
        "fix-triton",
        "--from-source",
        through=("unshare", "-m", "sh", "-c", READ_ONLY, str(built.layout.environment)),
    )
    assert ".vllm cannot be written" in ended.error(6)
    assert not built.layout.triton.exists()
    assert tritons.builds(built) == []


def test_assembler_for_running_is_kept_from_the_build(built: World, upstream: Upstream) -> None:
    build(built)
    built.env["TRITON_PTXAS_BLACKWELL_PATH"] = "/bin/true"
    build(built)
