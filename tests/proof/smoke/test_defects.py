"""Each defect, seeded into a built tree, fails the check that names its cause; a clean tree passes.

SMOKE_PROOF_CLONE names a bootstrapped clone that the test may damage; without it the test makes
one. Verdicts are appended to defects.tsv there.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.proof.smoke import engine_defects, model_defects, request_defects
from tests.proof.smoke.defects import DEFECTS, Defect
from workspace.core.paths import Layout, here


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    if named := os.environ.get("SMOKE_PROOF_CLONE"):
        return Layout(Path(named))
    folder = tmp_path_factory.mktemp("proof") / "clone"
    subprocess.run(["git", "clone", "--quiet", here().root, folder], check=True)
    # The Python of the tests writes no bytecode, but a build must.
    environment = {
        name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    subprocess.run(["./scripts/inv", "bootstrap"], cwd=folder, env=environment, check=True)
    return Layout(folder)


def smoke(layout: Layout, *args: str) -> tuple[int, str, float]:
    argv = [layout.tools / "bin" / "python", "-m", "workspace.cli.sessions", "smoke", *args]
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
    """Return the processes of the built environment.

    They are found by their libraries, because an engine has a title instead of a command line.
    """
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(layout.environment) in maps.read_text(errors="replace"):
                found.add(maps.parent.name)
    return found


@pytest.mark.parametrize(
    "defect",
    [
        *DEFECTS,
        *request_defects.DEFECTS,
        *model_defects.DEFECTS,
        *engine_defects.DEFECTS,
    ],
    ids=lambda defect: defect.what,
)
def test_defect_is_caught_by_the_check_that_names_it_and_leaves_no_process(
    built: Layout, defect: Defect
) -> None:
    with seeded(built, defect):
        code, output, seconds = smoke(
            built, "--fail-fast", "--level", defect.level, "--timeout-s", str(defect.timeout_s)
        )
    failed = [line.split()[1] for line in output.splitlines() if line.startswith("FAIL ")]
    with (built.state / "defects.tsv").open("a") as file:
        found = ", ".join(failed) or output.splitlines()[-2]
        file.write(f"{defect.what}\t{defect.caught_by}\t{found}\t{seconds:.0f}\n")
    assert code == 8, output
    assert defect.caught_by in failed or defect.caught_by in output.splitlines()[-2], output
    assert not defect.in_record or defect.in_record in built.smoke_record.read_text()
    assert living(built) == set()


def test_clean_tree_passes_however_often(built: Layout) -> None:
    for _ in range(int(os.environ.get("SMOKE_PROOF_RUNS", "20"))):
        code, output, _ = smoke(built)
        assert code == 0, output
    assert json.loads(built.smoke_record.read_bytes())["verdict"] == "pass"
