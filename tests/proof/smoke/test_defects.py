"""The smoke cannot be fooled: each defect, seeded into a built tree of its own, fails the check
that names its cause; the clean tree passes.

SMOKE_PROOF_CLONE names a clone that is bootstrapped already and may be spoilt; without it one is
made. Verdicts are appended to defects.tsv there.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.proof.smoke.defects import DEFECTS, Defect
from workspace.core.paths import Layout, here


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    if named := os.environ.get("SMOKE_PROOF_CLONE"):
        return Layout(Path(named))
    folder = tmp_path_factory.mktemp("proof") / "clone"
    subprocess.run(["git", "clone", "--quiet", here().root, folder], check=True)
    # Python that runs the tests writes no bytecode, and a build has to.
    environment = {
        name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    subprocess.run(["./scripts/inv", "bootstrap"], cwd=folder, env=environment, check=True)
    return Layout(folder)


def smoke(layout: Layout, *words: str) -> tuple[int, str, float]:
    argv = [layout.tools / "bin" / "python", "-m", "workspace.cli.sessions", "smoke", *words]
    started = time.monotonic()
    done = subprocess.run(
        argv, cwd=layout.root, capture_output=True, text=True, timeout=3600, check=False
    )
    return done.returncode, done.stderr, time.monotonic() - started


@contextmanager
def seeded(layout: Layout, defect: Defect) -> Iterator[None]:
    path = defect.path(layout)
    former = path.read_bytes() if path.exists() else None
    worse = defect.change(former or b"")
    try:
        if worse:
            path.write_bytes(worse)
        else:
            path.unlink()
        yield
    finally:
        if former is None:
            path.unlink()
        else:
            path.write_bytes(former)


def living(layout: Layout) -> set[str]:
    """Processes of the built environment, whatever they call themselves: an engine has a title and
    no words, but libraries from there.
    """
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(layout.environment) in maps.read_text(errors="replace"):
                found.add(maps.parent.name)
    return found


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.what)
def test_defect_is_caught_by_what_names_it_and_leaves_no_process(
    built: Layout, defect: Defect
) -> None:
    with seeded(built, defect):
        code, output, seconds = smoke(
            built, "--fail-fast", "--level", defect.level, "--timeout-s", str(defect.timeout_s)
        )
    failed = [line.split()[1] for line in output.splitlines() if line.startswith("FAIL ")]
    with (built.state / "defects.tsv").open("a") as file:
        file.write(
            f"{defect.what}\t{defect.caught_by}\t{', '.join(failed) or output.splitlines()[-2]}\t{seconds:.0f}\n"
        )
    assert code == 8, output
    assert defect.caught_by in failed or defect.caught_by in output.splitlines()[-2], output
    assert not defect.told or defect.told in built.smoke_record.read_text()
    assert living(built) == set()


def test_clean_tree_passes_however_often(built: Layout) -> None:
    for _ in range(int(os.environ.get("SMOKE_PROOF_RUNS", "20"))):
        code, output, _ = smoke(built)
        assert code == 0, output
    assert json.loads(built.smoke_record.read_bytes())["verdict"] == "pass"
