"""A real bundle: made here, bootstrapped from without a network, in a fresh clone and a fresh home.

Needs a verified build for the CPU in this clone, the package index, root (for `unshare` and a file
system of its own), and 8 GB of disk.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proof.aarch64 import spark
from workspace.core.files import sha256

ROOT = Path(__file__).resolve().parents[2]
INV, NOX = "./scripts/inv", "./scripts/nox"
LIMIT_S = 3600.0
# Fills a file system while the bundle is made in it, then makes room and resumes.
FULL = """set -u
mount -t tmpfs -o size=950M none "$1"
"$2" bundle "$1/b" & pid=$!
while [ "$(ls "$1/b/files" 2>/dev/null | wc -l)" -lt 20 ]; do
    kill -0 $pid || exit 1
    sleep 0.05
done
cat /dev/zero > "$1/filler" 2>/dev/null
wait $pid
echo "full: $?"
test -e "$1/b/manifest.json" && echo "a manifest of half a bundle"
rm "$1/filler"
"$2" bundle "$1/b"
echo "resumed: $?"
"""


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder on a disk: pytest's own may be in memory, and an environment has 3 GB."""
    folder = Path(tempfile.mkdtemp(prefix="bundle-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(argv: list[str], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a program; print how long it took, and return what it wrote."""
    began = time.monotonic()
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    print(f"{' '.join(argv)[-60:]}: {done.returncode}, {time.monotonic() - began:.0f} s")
    assert done.returncode == 0, done.stdout
    return done.stdout


def facts(clone: Path) -> tuple[str, dict[str, str], set[str]]:
    """Return the tree, each library with its hash, and the installed packages of a clone."""
    tree = run(["git", "-C", "vendor/vllm", "rev-parse", "HEAD^{tree}"], cwd=clone)
    package = clone / "vendor" / "vllm" / "vllm"
    libraries = {str(path.relative_to(package)): sha256(path) for path in package.rglob("*.so")}
    uv = str(ROOT / ".workspace" / "tools" / "bin" / "uv")
    frozen = run([uv, "pip", "freeze", "--python", ".vllm/bin/python"], cwd=clone)
    packages = {line for line in frozen.splitlines() if "==" in line}
    return tree, libraries, packages


def without_network(argv: str, *, cwd: Path, home: Path) -> str:
    """Run a shell line in a network of its own, in which only the loopback is up.

    The environment is that of a fresh account: no uv on PATH, no setting.
    """
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home)}
    line = f"ip link set lo up && {argv}"
    return run(["unshare", "--net", "sh", "-c", line], cwd=cwd, env=env)


def test_bundle_ends_on_the_same_build_and_the_smoke_is_green(work: Path) -> None:
    made = run([INV, "bundle", str(work / "b")], cwd=ROOT)
    print(made)
    home = work / "home"
    home.mkdir()
    run(["git", "clone", "--quiet", "b/files/workspace.bundle", "clone"], cwd=work)
    clone = work / "clone"
    with pytest.raises(AssertionError, match="Could not resolve|Network is unreachable"):
        without_network("git ls-remote https://github.com/x/y", cwd=clone, home=home)
    print(without_network(f"{INV} bootstrap --from ../b", cwd=clone, home=home))
    assert facts(clone) == facts(ROOT)
    print(without_network(f"{NOX} -s smoke", cwd=clone, home=home))
    # Nothing refers to the bundle afterwards.
    shutil.rmtree(work / "b")
    assert "nothing to do" in without_network(f"{INV} rebuild", cwd=clone, home=home)
    again = without_network(f"{INV} bootstrap", cwd=clone, home=home)
    assert "nothing to do" in again


def test_full_disk_in_the_middle_is_a_sentence_and_the_next_run_resumes(work: Path) -> None:
    place = work / "small"
    place.mkdir()
    argv = ["unshare", "--mount", "sh", "-c", FULL, "sh", str(place), INV]
    output = run(argv, cwd=ROOT)
    print(output)
    assert "full: 6" in output
    assert f"{place / 'b' / 'files'}" in next(
        line for line in output.splitlines() if "cannot be written: No space left" in line
    )
    assert "a manifest of half a bundle" not in output
    assert "resumed: 0" in output
    counts = [line.split("to fetch: ")[1] for line in output.splitlines() if "to fetch: " in line]
    assert int(counts[1].split()[0]) < int(counts[0].split()[0])


@pytest.mark.parametrize("python", spark.PYTHONS)
def test_plan_for_a_spark_is_what_the_resolver_chooses(python: str, tmp_path: Path) -> None:
    flags = ["--for", "aarch64", "--python", python, "--device", "cuda", "--plan"]
    done = subprocess.run(
        [INV, "bundle", str(tmp_path / "b"), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    total = sum(int(size) for size, _, _ in rows)
    print(f"Python {python}: {len(rows)} files, {total / 1e6:.0f} MB")
    found = {name: sha for _, sha, name in rows}
    wanted = [
        *spark.closure("cuda", python=python, folder=tmp_path),
        *spark.resolve(spark.LOCK.read_text(), python=python, folder=tmp_path),
    ]
    for package in wanted:
        names = [wheel for wheel in package.wheels if found.get(wheel.filename) == wheel.sha256]
        assert names, f"{package.name} {package.version} is not in the plan"
    pinned = spark.precompiled_wheels()["cuda"]
    assert found[pinned.filename] == pinned.sha256
    resolved = {wheel.filename for package in wanted for wheel in package.wheels}
    others = found.keys() - resolved - {pinned.filename}
    assert {name for name in others if name.endswith(".whl")} == set()
    assert all("aarch64" in name or "-any" in name or name.endswith(".tar.gz") for name in found)
