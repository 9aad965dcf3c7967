"""The bisect on real git histories: wrong ends, merges, carried patches, trees that cannot be
tried, and a run that is killed at any try.
"""

import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.bench.histories import Made, make
from tests.small.materials import git
from workspace.bench import bisect, bisect_log, bisect_predicate
from workspace.bench.bisect import Attempt, Found
from workspace.bench.bisect_log import BisectLog, BisectOptions
from workspace.bench.bisect_predicate import Outcome, Predicate
from workspace.core.console import Console
from workspace.core.errors import CheckoutError, PatchDrift, SettingsError, WorkspaceError
from workspace.core.paths import Layout
from workspace.repo.git import Git, history

LINES = "".join(f"line {number}\n" for number in range(1, 31))


class Place:
    """A workspace that has only vendor/vllm with a history.

    A tree with a file `broken` is bad; a tree with a file `stuck` cannot be tried.
    """

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.vllm.mkdir(parents=True)
        git(self.layout.vllm, "init", "--quiet")
        self.base, self.patches = "", tuple[Path, ...]()
        self.tried: list[str] = []
        self.err = io.StringIO()

    def history(self, *commits: Made) -> dict[str, str]:
        made = make(self.layout.vllm, commits)
        git(self.layout.vllm, "checkout", "--quiet", "--detach", made[commits[0].name])
        self.base = made[commits[-1].name]
        return made

    def attempt(self, commit: str, log: BisectLog) -> Outcome:
        repository = Git(self.layout.vllm)
        tip = history.carried(repository, commit, self.patches).tip
        self.tried.append(commit)
        if tip is None:
            return Outcome("skip", "a patch does not apply there")
        names = git(self.layout.vllm, "ls-tree", "--name-only", tip).split()
        return (
            Outcome("skip", "it is stuck")
            if "stuck" in names
            else Outcome("bad", "it is broken")
            if "broken" in names
            else Outcome("good", "fine")
        )

    def search(self, options: BisectOptions, attempt: Attempt | None = None) -> Found:
        console = Console(out=io.StringIO(), err=self.err)
        searched = bisect_log.open_range(self.layout, self.base, self.patches, options)
        log = bisect.begin(self.layout, searched, options, console=console)
        return bisect.Search(self.layout, searched, attempt or self.attempt, console, log).run()

    def outcome(self, options: BisectOptions) -> str:
        """Return the bisect's stdout; its errors pass through."""
        found, out = self.search(options), io.StringIO()
        json.dumps(found.document(), allow_nan=False)
        bisect_log.log_path(self.layout).unlink()
        bisect.conclude(found, console=Console(out=out, err=self.err))
        return out.getvalue().strip()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def line(count: int, *, broken: int) -> list[Made]:
    """Return commits c0, c1 …, each an edit; the file that `broken` adds stays."""
    made = [Made("c0", {"text": LINES})]
    for number in range(1, count):
        made.append(
            Made(
                f"c{number}",
                {"number": f"{number}\n"} | ({"broken": "x"} if number == broken else {}),
            )
        )
    return made


def ends(made: dict[str, str], last: str, first: str = "c0", **more: object) -> BisectOptions:
    return BisectOptions("smoke", made[first], made[last], **more)  # type: ignore[arg-type]


def typed(place: Place, error: WorkspaceError) -> list[str]:
    """Run the command of a hint that lists commits in the clone; return their subjects."""
    assert error.hint
    argv = shlex.split(error.hint.partition("    ")[0])
    done = subprocess.run(
        argv, cwd=place.layout.root, capture_output=True, text=True, check=True, timeout=60
    )
    return [line.partition(" ")[2] for line in done.stdout.splitlines()]


def test_broken_commit_among_64_is_named_with_its_stats_in_eight_tries(place: Place) -> None:
    made = place.history(*line(65, broken=41))
    assert place.outcome(ends(made, "c64")) == made["c41"]
    output = place.err.getvalue()
    assert f"the first bad commit is {made['c41'][:12]} c41" in output
    assert re.search(r"broken +\| 1 \+", output)
    assert "it is broken" in output
    assert f"git -C vendor/vllm show {made['c41'][:12]}" in output
    assert "64 suspects left: " in output
    assert len(place.tried) == 8


def test_merged_branch_is_searched_too_and_its_merge_is_not_blamed(place: Place) -> None:
    made = place.history(
        *line(5, broken=99),
        Made("side1", {"side": "1"}, ("c1",)),
        Made("side2", {"side": "2", "broken": "x"}),
        Made("side3", {"side": "3"}),
        Made("merge", {"side": "3", "broken": "x"}, ("c4", "side3")),
        Made("after", {"number": "after"}),
    )
    assert place.outcome(ends(made, "after")) == made["side2"]


def test_shallow_clone_is_searched(place: Place, tmp_path: Path) -> None:
    made = place.history(*line(9, broken=5))
    shallow = Place(tmp_path / "shallow")
    source = f"file://{place.layout.vllm}"
    git(shallow.layout.vllm, "fetch", "--quiet", "--depth=7", source, "history")
    shallow.base = made["c8"]
    assert shallow.outcome(ends(made, "c8", "c2")) == made["c5"]


def test_merge_base_of_a_good_release_on_its_own_branch_is_tried_first(place: Place) -> None:
    made = place.history(
        *line(6, broken=4),
        Made("release", {"version": "1"}, ("c1",)),
        Made("last", {"version": "2"}, ("c5",)),
    )
    assert place.outcome(ends(made, "last", "release")) == made["c4"]
    assert place.tried[:3] == [made["release"], made["last"], made["c1"]]


def test_bad_merge_base_is_reported_as_fixed_before_the_good_end(place: Place) -> None:
    made = place.history(
        Made("c0", {"broken": "x"}), Made("c1", {"number": "1"}), Made("last", {"number": "2"})
    )
    # The file is gone on the branch of the release only.
    tree = git(place.layout.vllm, "mktree", "--missing")
    release = git(place.layout.vllm, "commit-tree", "-m", "release", "-p", made["c1"], tree)
    with pytest.raises(
        SettingsError,
        match=r"c1, the merge base of .* release and the bad end, is bad: it is broken",
    ) as caught:
        place.outcome(BisectOptions("smoke", release, made["last"]))
    assert typed(place, caught.value) == ["release"]


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ("c4", "c5", "the good end, .* c4, is bad: it is broken"),
        ("c0", "c1", "the bad end, .* c1, is good: fine"),
    ],
)
def test_end_with_the_wrong_verdict_is_reported_with_the_evidence(
    place: Place, good: str, bad: str, says: str
) -> None:
    made = place.history(*line(6, broken=3))
    with pytest.raises(SettingsError, match=says):
        place.outcome(ends(made, bad, good))


def test_commits_that_cannot_be_tried_are_skipped_and_the_remaining_suspects_named(
    place: Place,
) -> None:
    commits = [Made("c0", {"text": "x"})]
    for number in range(1, 10):
        commits.append(
            Made(f"c{number}", {"number": str(number)} | ({"broken": "x"} if number == 5 else {}))
        )
    made = place.history(*commits)

    def attempt(commit: str, log: BisectLog) -> Outcome:
        return (
            Outcome("skip", "it cannot be built")
            if commit in (made["c4"], made["c5"])
            else place.attempt(commit, log)
        )

    found = place.search(ends(made, "c9"), attempt)
    assert found.left == (made["c4"], made["c5"], made["c6"])
    assert found.document()["verdict"] == "inconclusive"
    with pytest.raises(
        WorkspaceError,
        match="one of 3 commits, of which the last is bad and the others cannot be tried",
    ) as caught:
        bisect.conclude(found, console=Console(out=io.StringIO(), err=place.err))
    assert [text.split()[1] for text in caught.value.details] == ["c4:", "c5:", "c6"]
    assert typed(place, caught.value) == ["c6", "c5", "c4"]


def test_end_that_cannot_be_tried_is_not_kept_in_the_log(place: Place) -> None:
    made = place.history(*line(4, broken=2))
    with pytest.raises(WorkspaceError, match=r"the good end, .* cannot be tried: the disk is full"):
        place.search(ends(made, "c3"), lambda *_: Outcome("skip", "the disk is full"))
    assert place.outcome(ends(made, "c3")) == made["c2"]


def test_run_that_is_ended_at_any_try_is_resumed_by_the_same_command_and_by_no_other(
    place: Place,
) -> None:
    made = place.history(*line(33, broken=20))
    options, ended = ends(made, "c32"), 0
    while True:
        tries = 0

        def attempt(commit: str, log: BisectLog) -> Outcome:
            nonlocal tries
            tries += 1
            if tries > 1:
                raise KeyboardInterrupt
            return place.attempt(commit, log)

        try:
            found = place.search(options, attempt)
            break
        except KeyboardInterrupt:
            ended += 1
            with pytest.raises(
                SettingsError,
                match=r"another bisect is in progress, \d steps?, .* min: --run smoke from ",
            ):
                place.search(BisectOptions("parity.llama", made["c0"], made["c32"]))
    assert found.culprit == made["c20"]
    assert len(place.tried) == len(set(place.tried)) == len(found.log.tries) == ended + 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schema": 2}', b'{"schema": 1, "asked": {}}', b"\xff"]
)
def test_damaged_log_is_refused_with_the_abort_command(place: Place, content: bytes) -> None:
    made = place.history(*line(3, broken=1))
    bisect_log.log_path(place.layout).parent.mkdir(parents=True)
    bisect_log.log_path(place.layout).write_bytes(content)
    with pytest.raises(WorkspaceError, match="cannot resume the bisect in") as caught:
        place.search(ends(made, "c2"))
    assert caught.value.hint == "./scripts/nox -s bisect -- --abort"


def test_log_of_the_first_edition_is_resumed(place: Place) -> None:
    made = place.history(*line(3, broken=1))
    options = ends(made, "c2")
    searched = bisect_log.open_range(place.layout, place.base, (), options)
    bisect.begin(place.layout, searched, options, console=Console(err=place.err))
    path = bisect_log.log_path(place.layout)
    document = json.loads(path.read_text())
    document["asked"], document["ground"] = document.pop("options"), document.pop("context")
    assert set(document) == {"schema", "asked", "good", "bad", "ground", "tries"}
    path.write_text(json.dumps(document))
    assert place.outcome(options) == made["c1"]
    assert "resuming after 0 steps" in place.err.getvalue()


def patch_of(place: Place, base: str, name: str, old: str, new: str, *, file: str = "text") -> Path:
    """Write a patch on `base`, as format-patch does, that changes one line of a file."""
    work = place.layout.root / "work"
    if not work.exists():
        git(place.layout.vllm, "worktree", "add", "--quiet", "--detach", str(work), base)
    git(work, "checkout", "--quiet", "--detach", base)
    text = (work / file).read_text() if (work / file).exists() else ""
    (work / file).write_text(text.replace(old, new) if old else new)
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "-m", f"{name}\n\nUpstream-Status: Pending")
    folder = place.layout.patches("vllm")
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}.patch"
    made.write_text(
        git(
            work,
            "format-patch",
            "--stdout",
            "--zero-commit",
            "--full-index",
            "--no-signature",
            "--keep-subject",
            "-1",
        )
        + "\n"
    )
    return made


def test_patches_are_carried_to_every_commit_without_those_that_upstream_has_there(
    place: Place,
) -> None:
    twenty = LINES.replace("line 20\n", "line twenty\n")
    made = place.history(
        Made("c0", {"text": LINES}),
        Made("c1", {"text": LINES.replace("line 1\n", "line one\n")}),
        Made("c2", {"text": twenty}),
        Made("c3", {"text": twenty.replace("line twenty\n", "line otherwise\n")}),
        Made("c4", {"text": LINES.replace("line 18\n", "line eighteen\n")}, ("c0",)),
    )
    patch = patch_of(place, made["c0"], "twenty", "line 20\n", "line twenty\n")
    repository = Git(place.layout.vllm)
    for name, is_other, left_out in (
        ("c0", True, ()),
        ("c1", True, ()),
        ("c2", False, ("twenty.patch",)),
        ("c4", True, ()),
    ):
        found = history.carried(repository, made[name], [patch])
        assert found.left_out == left_out, name
        assert found.tip
        assert (found.tip != made[name]) is is_other, name
        assert "line twenty" in git(place.layout.vllm, "show", f"{found.tip}:text"), name
        assert found == history.carried(repository, made[name], [patch])
    assert history.carried(repository, made["c3"], [patch]).failing == "twenty.patch"


def test_bisect_leaves_the_users_own_bisect_head_index_and_references_alone(place: Place) -> None:
    made = place.history(*line(9, broken=5))
    patch = patch_of(place, made["c0"], "more", "", "more\n", file="more")
    place.patches = (patch,)
    git(place.layout.vllm, "bisect", "start", made["c8"], made["c0"])
    state = {
        path: path.read_bytes()
        for path in (place.layout.vllm / ".git").rglob("*")
        if path.is_file() and "objects" not in path.parts
    }
    assert place.outcome(ends(made, "c8")) == made["c5"]
    assert {path: path.read_bytes() for path in state} == state
    assert {
        path
        for path in (place.layout.vllm / ".git").rglob("*")
        if path.is_file() and "objects" not in path.parts
    } == set(state)


def test_breaking_patch_among_eight_is_named_and_not_the_last_patch(place: Place) -> None:
    made = place.history(Made("c0", {"text": LINES}))
    patches, tip = [], made["c0"]
    for number in range(1, 9):
        patches.append(
            patch_of(
                place,
                tip,
                f"p{number}",
                "",
                "x\n",
                file="broken" if number == 3 else f"file{number}",
            )
        )
        tip = git(place.layout.root / "work", "rev-parse", "HEAD")
    place.patches = tuple(patches)

    def attempt(commit: str, log: BisectLog) -> Outcome:
        names = git(place.layout.vllm, "ls-tree", "--name-only", commit).split()
        return Outcome("bad" if "broken" in names else "good", "looked")

    options = BisectOptions("smoke", is_patches=True)
    found = place.search(options, attempt)
    assert found.culprit
    assert found.searched.title(found.culprit) == "p3.patch"
    assert len(found.log.tries) == 5
    place.patches = place.patches[:-1]
    with pytest.raises(SettingsError, match="or with another pin or other patches"):
        place.search(options, attempt)


def test_patch_that_changes_nothing_on_the_pin_is_refused_until_its_line_is_gone(
    place: Place,
) -> None:
    made = place.history(Made("c0", {"text": LINES}))
    first = patch_of(place, made["c0"], "p1", "", "x\n", file="one")
    twice = first.with_name("p2.patch")
    twice.write_text(first.read_text())
    series = first.with_name("series")
    series.write_text("p1.patch\np2.patch\n")

    def options() -> BisectOptions:
        place.patches = tuple(first.with_name(name) for name in series.read_text().split())
        return BisectOptions("smoke", is_patches=True)

    with pytest.raises(PatchDrift, match="changes nothing on the pin") as caught:
        place.search(options())
    assert caught.value.hint
    command = caught.value.hint.partition("    ")[0]
    environment = {"EDITOR": "sed -i /p2.patch/d", "PATH": "/usr/bin:/bin"}
    subprocess.run(
        ["/bin/bash", "-c", command], cwd=place.layout.root, env=environment, check=True, timeout=60
    )

    def attempt(commit: str, log: BisectLog) -> Outcome:
        names = git(place.layout.vllm, "ls-tree", "--name-only", commit).split()
        return Outcome("bad" if "one" in names else "good", "looked")

    found = place.search(options(), attempt)
    assert found.culprit
    assert found.searched.title(found.culprit) == "p1.patch"


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ("v9.9", None, "has no 'v9.9'"),
        ("c", None, "has no 'c'"),
        (None, None, "there is no known-good state"),
        ("c2", "c1", "no later than"),
        ("c1", "c1", "no later than"),
    ],
)
def test_invalid_ends_are_refused_before_anything_is_written(
    place: Place, good: str | None, bad: str | None, says: str
) -> None:
    made = place.history(*line(3, broken=1))
    with pytest.raises(SettingsError, match=says):
        place.search(BisectOptions("smoke", made.get(good or "", good), made.get(bad or "", bad)))
    assert bisect_log.read_log(place.layout) is None


def test_ends_without_common_history_are_refused(place: Place) -> None:
    made = place.history(*line(3, broken=1))
    tree = git(place.layout.vllm, "mktree", "--missing")
    with pytest.raises(CheckoutError, match="have no common history"):
        place.search(
            BisectOptions(
                "smoke", git(place.layout.vllm, "commit-tree", "-m", "alone", tree), made["c2"]
            )
        )


def test_good_end_is_by_default_where_the_last_known_good_state_left_upstream(place: Place) -> None:
    made = place.history(*line(9, broken=7))
    for name in ("c2", "c4"):
        patched = git(
            place.layout.vllm,
            "commit-tree",
            "-m",
            "patched",
            "-p",
            made[name],
            git(place.layout.vllm, "rev-parse", f"{made[name]}^{{tree}}"),
        )
        git(place.layout.vllm, "update-ref", f"refs/good/{name}", patched)
    git(place.layout.vllm, "update-ref", "refs/good/pin", made["c8"])
    git(place.layout.vllm, "tag", "v1.0", made["c8"])
    assert place.outcome(BisectOptions("smoke", None, "1.0")) == made["c7"]
    assert place.tried[0] == made["c4"]


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("smoke", "smoke", "smoke"),
        ("parity.llama", "check", "parity.llama"),
        ("bench:ttft", "bench", "ttft"),
        ("python -c 'import vllm'", "command", None),
    ],
)
def test_argument_of_run_is_the_smoke_a_check_a_metric_or_a_command(
    tmp_path: Path, text: str, kind: str, name: str | None
) -> None:
    found = bisect_predicate.parse(text, folder=tmp_path)
    assert (found.kind, found.name) == (kind, name or text)
    assert found.argv == (("python", "-c", "import vllm") if kind == "command" else ())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("parity.lama", "did you mean parity.llama?"),
        ("smok", "did you mean smoke?"),
        ("kernels.nothing", "one of provenance"),
        ("parity.model", "smoke    or bench:METRIC"),
        ("bench:latencies", "did you mean bench:latency?"),
        ("bench:", "the metrics are latency"),
        ("", "smoke    or bench:METRIC"),
        ("sh -c 'open", "quote the whole command"),
    ],
)
def test_typo_in_run_gets_the_nearest_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        bisect_predicate.parse(text, folder=tmp_path)
    assert says in str(caught.value.hint)


def test_relative_files_of_a_command_start_where_it_was_typed(tmp_path: Path) -> None:
    (tmp_path / "try.py").touch()
    assert bisect_predicate.parse("python try.py --more", folder=tmp_path).argv == (
        "python",
        str(tmp_path / "try.py"),
        "--more",
    )


def row(name: str, verdict: str, evidence: str = "seen", seconds: float = 1.0) -> dict[str, object]:
    return {"id": name, "verdict": verdict, "evidence": evidence, "seconds": seconds}


@pytest.mark.parametrize(
    ("rows", "smoke", "check"),
    [
        ([row("parity.llama", "pass"), row("binary.load", "pass")], "good", "good"),
        ([row("parity.llama", "pass"), row("binary.load", "fail")], "bad", "good"),
        ([row("parity.llama", "fail"), row("binary.load", "pass")], "bad", "bad"),
        ([row("parity.llama", "fail", seconds=90.0), row("binary.load", "pass")], "skip", "skip"),
        (
            [row("parity.llama", "fail", "gave no answer in 80 s, its stacks are in the log")],
            "skip",
            "skip",
        ),
        ([row("parity.llama", "fail", seconds=90.0), row("binary.load", "fail")], "bad", "skip"),
        ([row("parity.llama", "skipped"), row("binary.load", "pass")], "good", "skip"),
        ([row("binary.load", "pass")], "good", "skip"),
    ],
)
def test_check_that_fails_by_a_timeout_is_skipped_and_not_bad(
    rows: list[dict[str, object]], smoke: str, check: str
) -> None:
    record = {"checks": rows}
    assert (
        bisect_predicate.judge_smoke(Predicate("smoke", "smoke"), record, timeout_s=100).verdict
        == smoke
    )
    assert (
        bisect_predicate.judge_smoke(
            Predicate("check", "parity.llama"), record, timeout_s=100
        ).verdict
        == check
    )
    assert bisect_predicate.judge_smoke(
        Predicate("smoke", "smoke"), "not built", timeout_s=100
    ) == Outcome("skip", "not built")
