"""The verbs on patches and pins, each from a state in which it has something to do, and what a user
types after it was killed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.bump.conftest import ROWS, judge_at_once, smoke
from tests.proof.kill.cases import KillCase, plant, write_dotenv
from tests.small import releases
from tests.small.materials import git
from tests.small.releases import CLEAN, CONFLICT
from tests.small.world import World
from workspace.repo.git import command

# Each of them leads on; more than this is a circle.
MOST_COMMANDS = 6
LINE = '                        "vllm/_C_AVX512.abi3.so",\n'
STATUS = "\n\nUpstream-Status: Pending"


def mine(world: World) -> Mapping[str, str]:
    """Digests of what no verb may touch."""
    top = world.folder
    kept = (
        ".env",
        "notes.txt",
        "requirements/tools.in",
        "later.mbox",
        "patches/vllm/later.patch",
        "vendor/vllm/new.txt",
        "vendor/vllm/vllm/envs.py",
    )
    files = {f"clone/{name}": top / "clone" / name for name in kept} | {
        "cache/mine.txt": top / "cache" / "mine.txt"
    }
    if not git(world.layout.vllm, "status", "--porcelain", "vllm/envs.py"):
        del files["clone/vendor/vllm/vllm/envs.py"]
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.exists()
    }


def both(world: World) -> dict[str, Path]:
    return {"clone": world.root, "vllm": world.layout.vllm}


def remember(world: World) -> None:
    """Write down what the user has: files, branches, every commit that anything leads to."""
    record = {
        "files": mine(world),
        "branches": {
            name: git(folder, "for-each-ref", "refs/heads", "refs/tags")
            for name, folder in both(world).items()
        },
        "commits": {
            name: git(folder, "rev-list", "--all", "HEAD").split()
            for name, folder in both(world).items()
        },
        "here": {name: commits(folder) for name, folder in both(world).items()},
    }
    (world.folder / "before.json").write_text(json.dumps(record))


def commits(folder: Path) -> list[str]:
    """Every commit among the objects, be it reachable or not."""
    lines = git(
        folder, "cat-file", "--batch-all-objects", "--batch-check=%(objectname) %(objecttype)"
    ).splitlines()
    return [line.split()[0] for line in lines if line.endswith(" commit")]


def check_remembered(world: World) -> None:
    """No file, branch, or commit of the user's is gone, and none that the verb made is lost.

    What refs/patches named before is found by its reflog. Lost is no commit whose very tree another
    one keeps: patches are put on aside first, without the trailer that `patch.import` adds, and
    what was to be kept under a name with the time in it is kept anew.
    """
    before = json.loads((world.folder / "before.json").read_text())
    assert mine(world) == before["files"]
    for name, folder in both(world).items():
        found = git(folder, "for-each-ref", "refs/heads", "refs/tags").splitlines()
        assert set(before["branches"][name].splitlines()) <= set(found), found
        reachable = set(git(folder, "rev-list", "--all", "HEAD").split())
        logged = set(git(folder, "rev-list", "--all", "--reflog", "HEAD").split())
        lost = set(before["commits"][name]) - logged
        assert not lost, f"{name}: {lost} are no longer reachable"
        trees = set(git(folder, "log", "--format=%T", "--all", "HEAD").split())
        for made in set(commits(folder)) - logged - set(before["here"][name]):
            tree, committer = git(folder, "show", "--no-patch", "--format=%T %ce", made).split()
            assert tree in trees, f"{name}: {made} leads nowhere"
            assert committer == command.IDENTITY[1], f"{name}: {made} of {committer} leads nowhere"
        assert logged >= reachable


def with_work(world: World) -> None:
    """A bootstrapped clone in which a user works."""
    plant(world)
    write_dotenv(world)
    world.bootstrap()
    world.git("branch", "topic")
    (world.layout.vllm / "new.txt").write_text("mine\n")
    (world.layout.patches("vllm") / "later.patch").write_text("not in the series yet\n")


def off(world: World) -> None:
    with_work(world)
    world.git("checkout", "--quiet", "--detach", world.materials.archive_commit)
    remember(world)


def applied(world: World) -> None:
    with_work(world)
    side_branch(world)
    remember(world)


def side_branch(world: World) -> None:
    """A branch with a commit that nothing else leads to."""
    head = world.git("rev-parse", "HEAD")
    commit(world, "Aside", "vllm/aside.py", "ASIDE = 1\n")
    world.git("branch", "aside")
    world.git("checkout", "--quiet", "--detach", head)


def commit(world: World, subject: str, path: str, text: str) -> None:
    (world.layout.vllm / path).write_text(text)
    world.git("add", path)
    world.git("commit", "--quiet", "-m", subject + STATUS)


def two_new_one_dropped(world: World) -> None:
    off(world)
    commit(world, "The first one", "vllm/one.py", "ONE = 1\n")
    commit(world, "The second one", "vllm/two.py", "TWO = 2\n")
    envs = world.layout.vllm / "vllm" / "envs.py"
    envs.write_text(envs.read_text() + "# mine\n")
    remember(world)


def mail(world: World) -> None:
    with_work(world)
    commit(world, "The first one", "vllm/one.py", "ONE = 1\n")
    world.git("commit", "--quiet", "--amend", "-m", "The first one\n\nWithout a trailer.")
    commit(world, "The second one", "vllm/two.py", "TWO = 2\n")
    (world.root / "later.mbox").write_text(world.git("format-patch", "--stdout", "-2") + "\n")
    world.git("checkout", "--quiet", "--detach", "topic")
    remember(world)


def resolved_conflict(world: World) -> None:
    """Three patches, of which the second does not apply to what the first makes; the user has
    resolved that.
    """
    with_work(world)
    base, setup = world.materials.archive_commit, world.layout.vllm / "setup.py"
    line = LINE.replace("_AVX512", "")
    world.git("checkout", "--quiet", "--detach", base)
    setup.write_text(setup.read_text().replace(line, line + line.replace("_C", "_C_AMX")))
    world.git("commit", "--quiet", "--all", "-m", "Take AMX" + STATUS)
    commit(world, "The third one", "vllm/three.py", "THREE = 3\n")
    series = world.layout.patches("vllm") / "series"
    for number, name in ((1, "Take-AMX"), (0, "The-third-one")):
        (series.parent / f"{name}.patch").write_text(
            world.git("format-patch", "--stdout", "--keep-subject", "-1", f"HEAD~{number}") + "\n"
        )
        series.write_text(series.read_text() + f"{name}.patch\n")
    world.git("branch", "made-here")
    world.git("checkout", "--quiet", "--detach", base)
    ended = world.run("patch.apply")
    assert "patch 2 of 3" in ended.error(4)
    resolve(world)
    remember(world)


def resolve(world: World) -> None:
    take_both_sides(world.layout.vllm / "setup.py")
    world.git("add", "setup.py")


def take_both_sides(file: Path) -> None:
    """Take git's marks of a conflict out of a file."""
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(
        "".join(
            line
            for line in lines
            if not line.startswith(("<<<<<<<", "=======", ">>>>>>>", "|||||||"))
        )
    )


def small_good(world: World) -> None:
    """A clone whose smoke judges and has passed, and an index with the next release."""
    judge_at_once(world.layout.probes)
    git(world.root, "commit", "--quiet", "--all", "-m", "A smoke for the small world")
    with_work(world)
    side_branch(world)
    ended = smoke(world)
    assert ended.code == 0, ended.output
    releases.make(world.materials).publish(world, CLEAN)


def to_be_bumped(world: World) -> None:
    small_good(world)
    remember(world)


def bumped(world: World) -> None:
    small_good(world)
    ended = world.run("pin.bump", f"v{CLEAN}")
    assert ended.code == 0, ended.output
    remember(world)


def to_be_bumped_into_a_conflict(world: World) -> None:
    """Three patches, of which the second does not apply to the release after the next; with a new
    file before it, and one that builds on it.
    """
    small_good(world)
    releases.make(world.materials).publish(world, CONFLICT)
    tip, setup, line = world.git("rev-parse", "HEAD"), world.layout.vllm / "setup.py", LINE
    world.git("checkout", "--quiet", "--detach", world.materials.archive_commit)
    commit(world, "The first one", "vllm/one.py", "ONE = 1\n")
    world.git("cherry-pick", tip)
    setup.write_text(setup.read_text().replace(line, line + line.replace("AVX512", "AMX")))
    world.git("commit", "--quiet", "--all", "-m", "Take AMX" + STATUS)
    typed(world, "patch.export")
    world.git("branch", "made-here")
    world.bootstrap()
    ended = smoke(world)
    assert ended.code == 0, ended.output
    remember(world)


def resolved_in_the_bump_sandbox(world: World) -> None:
    to_be_bumped_into_a_conflict(world)
    assert "patch 2 of 3" in world.run("pin.bump", f"v{CONFLICT}").error(4)
    resolve_in_the_bump_sandbox(world)
    remember(world)


def resolve_in_the_bump_sandbox(world: World) -> None:
    tree = world.layout.bump_sandbox / "vendor" / "vllm"
    take_both_sides(tree / "setup.py")
    git(tree, "add", "setup.py")


def stack(world: World) -> tuple[str, set[str]]:
    """The state of the stack, and the patches and commits that `inv patch` names."""
    ended = world.run("patch.status", "--json")
    assert ended.code == 0, ended.output
    rows = json.loads(ended.out)["rows"]
    return rows[0]["state"], {row["subject"] for row in rows[1:]}


def typed(world: World, *args: str, codes: tuple[int, ...] = (0,)) -> None:
    ended = world.run(*args)
    assert ended.code in codes, f"inv {' '.join(args)}: {ended.output}"
    assert "Traceback" not in ended.err, ended.output


def again_import(world: World) -> None:
    """Once the commits are on the stack an export is due; before, the import."""
    state, subjects = stack(world)
    if state != "unexported" and "The second one" not in subjects:
        typed(world, "patch.import", "clone/later.mbox")
    elif state == "unexported":
        typed(world, "patch.export")
    assert stack(world)[0] == "applied"


def again_continue(world: World) -> None:
    """Go on while something is under way, by what is hinted at, then make patches of what came of
    it.

    An `am` that was killed between two patches is begun anew, and its conflict resolved a second
    time; what lay there is kept.
    """
    for _ in range(MOST_COMMANDS):
        if stack(world)[0] == "unapplied":
            assert "patch 2 of 3" in world.run("patch.apply").error(4)
            resolve(world)
        ended = world.run("patch.continue")
        if ended.code == 0 or "no am, rebase" in ended.err:
            break
        assert ended.code in (3, 4), ended.output
        # One whose commit was made already has nothing more to change.
        typed(
            world,
            "patch.continue",
            "--skip" if "--skip    if that is right" in ended.err else "--abort",
        )
    typed(world, "patch.export")
    state, subjects = stack(world)
    assert state == "applied"
    assert {"Take AMX", "The third one"} < subjects, subjects


def lead_on(
    world: World, tag: str, verb: tuple[str, ...], *, fix: Callable[[World], None] | None = None
) -> None:
    """What `inv pin`, then `inv status` say is next, until the pin is at `tag`, all is built, and
    the state is recorded as good.

    `fix` resolves a conflict on the way; without it a conflict is a failure.
    """
    for _ in range(MOST_COMMANDS):
        ended = world.run("pin.show", "--json", "--offline")
        assert ended.code == 0, ended.output
        rows = json.loads(ended.out)["rows"]
        names = {row["name"] for row in rows}
        if "back" in names:
            typed(world, "pin.rollback")
        elif (
            "bump" in names
            or next(row["facts"]["tag"] for row in rows if row["name"] == "pin") != tag
        ):
            ended = world.run(*(("patch.continue",) if "bump" in names else verb))
            assert "Traceback" not in ended.err, ended.output
            if ended.code == 4 and fix:
                fix(world)
            else:
                assert ended.code == 0, ended.output
        elif any(state != "ok" for name, state in world.status().items() if name in ROWS):
            typed(world, "bootstrap")
        elif (
            not any(
                row["name"] == "good" and row["facts"]["current"] for row in rows if row["facts"]
            )
            or world.status()["smoke"] != "ok"
        ):
            ended = smoke(world)
            assert ended.code == 0, ended.output
        else:
            assert world.python("import vllm; print(vllm.__version__)") == f"{tag[1:]}+cpu"
            return
    raise AssertionError(f"{MOST_COMMANDS} commands did not lead to {tag}: {rows}")


def again_bump(world: World) -> None:
    lead_on(world, f"v{CLEAN}", ("pin.bump", f"v{CLEAN}"))


def again_conflict(world: World) -> None:
    lead_on(world, f"v{CONFLICT}", ("pin.bump", f"v{CONFLICT}"), fix=resolve_in_the_bump_sandbox)


def again_resolved(world: World) -> None:
    """What the user has resolved need not be resolved again."""
    lead_on(world, f"v{CONFLICT}", ("patch.continue",))


def again_back(world: World) -> None:
    lead_on(world, "v0.31.0", ("pin.rollback",))


MOVES = (
    KillCase(
        "patch.apply of a series taken off", off, ("patch.apply",), check_remembered, full_from=""
    ),
    KillCase(
        "patch.unapply beside work", applied, ("patch.unapply",), check_remembered, full_from=""
    ),
    KillCase(
        "patch.export of two, one dropped",
        two_new_one_dropped,
        ("patch.export",),
        check_remembered,
        full_from="",
    ),
    KillCase(
        "patch.import of a mail",
        mail,
        ("patch.import", "clone/later.mbox"),
        check_remembered,
        again_import,
        full_from="",
    ),
    KillCase(
        "patch.continue of a resolved am",
        resolved_conflict,
        ("patch.continue",),
        check_remembered,
        again_continue,
        full_from="",
    ),
    KillCase(
        "pin.bump to the next release",
        to_be_bumped,
        ("pin.bump", f"v{CLEAN}"),
        check_remembered,
        again_bump,
    ),
    KillCase(
        "pin.rollback after a bump",
        bumped,
        ("pin.rollback",),
        check_remembered,
        again_back,
        full_from="",
    ),
    KillCase(
        "pin.bump into a conflict",
        to_be_bumped_into_a_conflict,
        ("pin.bump", f"v{CONFLICT}"),
        check_remembered,
        again_conflict,
        code=4,
    ),
    KillCase(
        "patch.continue of a bump",
        resolved_in_the_bump_sandbox,
        ("patch.continue",),
        check_remembered,
        again_resolved,
    ),
)
