"""The rows: what is measured, against what, and the aim. A new row is one more entry of ROWS."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from workspace.perf import by_hand, replay, stacks
from workspace.perf.ground import Ground
from workspace.perf.measure import Aim, Command, Timed, Told

Sides = tuple[Timed, Timed]


@dataclass(frozen=True)
class Row:
    """`prepare` makes what the two sides need and yields them, the measured one first; it raises a WorkspaceError where it cannot."""

    name: str
    measured: str
    against: str
    aim: Aim | None
    prepare: Callable[[Ground], AbstractContextManager[Sides]]
    pairs: int = 10
    warm_ups: int = 1


@contextlib.contextmanager
def _list(ground: Ground) -> Iterator[Sides]:
    yield ground.inv("--list"), ground.bare()


@contextlib.contextmanager
def _inv_wrapper(ground: Ground) -> Iterator[Sides]:
    direct = ground.inv("--list")
    yield Command((ground.layout.root / "scripts" / "inv", "--list"), direct.cwd, direct.env), direct


@contextlib.contextmanager
def _nox_wrapper(ground: Ground) -> Iterator[Sides]:
    direct = ground.tool("-I", "-m", "nox", "-f", ground.layout.root / "noxfile.py", "--list")
    yield Command((ground.layout.root / "scripts" / "nox", "--list"), direct.cwd, direct.env), direct


@contextlib.contextmanager
def _status(ground: Ground) -> Iterator[Sides]:
    # An unbuilt tree is looked at in less time, which says nothing.
    _ = ground.built
    yield ground.inv("status"), ground.bare()


@contextlib.contextmanager
def _rebuild(ground: Ground) -> Iterator[Sides]:
    _ = ground.built
    yield ground.inv("rebuild"), ground.bare()


@contextlib.contextmanager
def _doctor(ground: Ground) -> Iterator[Sides]:
    # 6: the machine lacks something, which takes as long to find out.
    yield ground.inv("doctor", "--offline", statuses=(0, 6)), ground.bare()


def _told(prepare: Callable[[Ground], AbstractContextManager[replay.Sides]]) -> Callable[[Ground], AbstractContextManager[Sides]]:
    @contextlib.contextmanager
    def sides(ground: Ground) -> Iterator[Sides]:
        with prepare(ground) as (measured, against):
            yield Told(measured), Told(against)

    return sides


def _replays() -> Iterator[Row]:
    bound = "the least that any order takes"
    for gib in (24.0, 48.0, 96.0):
        here = f"the recorded build on {replay.CORES} cores in {gib:g} GiB"
        yield Row(f"replay-{gib:g}", f"{here}, admitted", bound, Aim("ratio", 1.1), _told(replay.in_thought(gib)), pairs=1, warm_ups=0)
        yield Row(f"static-{gib:g}", f"{here}, safe static jobs", bound, None, _told(replay.in_thought(gib, way=replay.static)), pairs=1, warm_ups=0)
    for gib in (24.0, 48.0):
        here = f"the same in {gib:g} GiB, {replay.SCALE:g} times as fast, through ninja and launchers"
        yield Row(f"ninja-{gib:g}", here, bound, Aim("ratio", 1.2), _told(replay.in_small_time(gib)), pairs=1, warm_ups=0)


_BARE = "a bare invoke with one empty task"
ROWS: tuple[Row, ...] = (
    Row("list", "inv --list", _BARE, Aim("ratio", 1.2), _list),
    Row("wrapper-inv", "scripts/inv --list", "the same, the tool called directly", Aim("extra", 0.03), _inv_wrapper),
    Row("wrapper-nox", "scripts/nox --list", "the same, the tool called directly", Aim("extra", 0.03), _nox_wrapper),
    Row("status", "inv status", _BARE, None, _status),
    Row("rebuild", "inv rebuild with nothing to do", _BARE, Aim("wall", 0.5), _rebuild),
    Row("doctor", "inv doctor --offline", _BARE, Aim("wall", 3.0), _doctor),
    Row(
        "no-op",
        "inv bootstrap with nothing to do",
        "uv pip install --no-build-isolation --no-deps -e, done before",
        Aim("ratio", 0.1),
        by_hand.installed_again,
        pairs=3,
    ),
    Row(
        "warm",
        "inv bootstrap in a fresh clone, caches warm",
        "the same commands typed by hand (by_hand.sh)",
        Aim("ratio", 1.1),
        by_hand.from_warm_caches,
        pairs=1,
        warm_ups=0,
    ),
    Row("apply", "inv patch.apply of a hundred patches, in this process", "git am of them", Aim("ratio", 1.15), stacks.applied, pairs=5),
    Row(
        "export",
        "inv patch.export with its proof, in this process",
        "git format-patch, and one git apply --cached of all files",
        Aim("ratio", 1.5),
        stacks.exported,
        pairs=5,
    ),
    Row("forecast", "inv pin.forecast of them, in this process", "git apply --cached one by one", Aim("ratio", 1.5), stacks.forecast, pairs=5),
    Row("re-apply", "inv patch.apply with nothing to do, in this process", "git status --porcelain", Aim("ratio", 2.0), stacks.applied_again),
    Row("patches", "inv patch, in this process", "git status --porcelain", Aim("ratio", 2.0), stacks.looked_at),
    *_replays(),
)
