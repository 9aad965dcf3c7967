"""nox -s spark in a small clone: runs that were killed, or had a part that failed, and go on."""

from tests.small.world import Ended, World
from tests.support.test_spark import clone, folder, followed, record, session, started, wait_for
from workspace.core.paths import Layout

__all__ = ["clone"]


def test_killed_run_resumes_between_and_within_parts(clone: World) -> None:
    assert session(clone, "--yes", "--only", "doctor").code == 0
    first = record(clone)["parts"]["doctor"]
    child = started(clone, "--yes", "--only", "doctor", "--only", "bootstrap", "--only", "quick")
    own = Layout(clone.layout.state / "spark" / "clone")
    wait_for((own.environment / "pyvenv.cfg").exists)
    clone.kill(child)
    assert set(record(clone)["parts"]) == {"doctor"}
    ended = session(clone, "--yes", "--only", "doctor", "--only", "bootstrap", "--only", "quick")
    assert ended.code == 0, ended.output
    found = record(clone)["parts"]
    assert found["doctor"] == first
    assert found["bootstrap"]["result"] == found["quick"]["result"] == "passed"


def test_failed_part_is_on_the_page_with_its_figures_and_runs_again(clone: World) -> None:
    ended = session(clone, "--without", "bootstrap", "--only", "quick", "--yes")
    assert "which the part bootstrap builds" in ended.error(2)
    assert followed(clone, ended, "--yes").code == 0
    ended = session(clone, "--yes", "--only", "rollback")
    assert "1 part failed: rollback: there is no known-good state" in ended.error(7)
    hint = record(clone)["parts"]["rollback"]["hint"]
    parity = clone.layout.probes / "parity.py"
    good = parity.read_text()
    parity.write_text(good.replace("equal = 0 if", "equal = 1 if True else 0 if"))
    ended = session(clone, "--yes", "--only", "quick")
    assert "1 part failed: quick" in ended.error(7)
    page = (folder(clone) / "page.md").read_text()
    assert "| quick: the smoke, twice | **failed**: " in page
    assert "| smoke quick, first time | " in page
    assert record(clone)["parts"]["quick"]["result"] == "failed"
    parity.write_text(good)
    ended = followed(clone, Ended(7, "", f"hint: {hint}"), "--yes")
    assert ended.code == 0, ended.output
    assert record(clone)["parts"]["quick"]["result"] == "passed"
