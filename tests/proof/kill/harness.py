"""One kill after the other: put the world back, end the verb at a chosen place, look, let it run
again, and judge.

A place is prepared once for a case; its states are distinguished by content, and one that was
completed rightly before is not run again.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.proof.kill import judge, launcher
from tests.proof.kill.cases import KillCase
from tests.proof.kill.ledger import Ledger, Result, failed
from tests.small.materials import Materials
from tests.small.world import Ended, World, make_world
from workspace.core.errors import ERRORS

CODES = tuple(error.exit_code for error in ERRORS)
PARTS = ("clone", "cache", "uv-cache", "tmp")
# One failure often comes again at each of the neighbouring calls.
ENOUGH_FAILURES = 12
# What a verb, the programs that it runs, and its world on a tmpfs take at most.
WORKER_BYTES = 512 << 20
REPORT_EVERY_S = 20.0
CHUNK = 16


@dataclass(frozen=True)
class Kill:
    """How a verb ended: where that was, in words, the code that the harness saw, and seconds until
    nothing of it lived.
    """

    place: str
    code: int | None
    quiet_s: float


@dataclass
class Place:
    """A world that a case starts from again and again, always at the same path, with downloads and
    uv's cache of its own.
    """

    case: KillCase
    world: World
    ledger: Ledger
    expected: judge.Fingerprint = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    undisturbed_s: float = 0.0

    @property
    def kept(self) -> Path:
        return self.world.folder / "kept"

    @property
    def mark(self) -> str:
        """What every process of this world has in its environment."""
        return f"HOME={self.world.folder / 'home'}"

    def keep(self) -> None:
        shutil.rmtree(self.kept, ignore_errors=True)
        self.kept.mkdir()
        self._copy(self.world.folder, self.kept)

    def restore(self) -> None:
        """Bring everything back; hard links between uv's cache and .vllm stay what they are."""
        subprocess.run(
            ["rm", "-rf", "--", *[self.world.folder / part for part in PARTS]], check=True
        )
        self._copy(self.kept, self.world.folder)
        self.world.index.faults.clear()
        self.world.index.requests.clear()

    def _copy(self, origin: Path, target: Path) -> None:
        subprocess.run(
            ["cp", "-a", "--reflink=auto", *[origin / part for part in PARTS], target], check=True
        )


def workers() -> int:
    """How many worlds are worked on side by side: one for each core that we may use, as far as
    memory goes.
    """
    import psutil

    return max(
        1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // WORKER_BYTES)
    )


def compile_below(folder: Path) -> None:
    """Write bytecode, as is there wherever a verb ran before: verbs run with -B here, and would
    compile all that they import, each time.
    """
    subprocess.run(
        [sys.executable, "-Es", "-m", "compileall", "-q", "-j", "0", folder],
        stdout=subprocess.DEVNULL,
    )


def make_places(
    case: KillCase, materials: Sequence[Materials], folders: Sequence[Path], ledger: Ledger
) -> list[Place]:
    """Prepare a world for each worker, all at once; each has an index of its own."""
    with ThreadPoolExecutor(len(folders)) as pool:
        pairs = enumerate(zip(materials, folders, strict=True))
        made = [
            pool.submit(make_place, case, given, folder, ledger, runs=1 if number else 2)
            for number, (given, folder) in pairs
        ]
        return [future.result() for future in made]


def make_place(
    case: KillCase, materials: Materials, folder: Path, ledger: Ledger, *, runs: int
) -> Place:
    """Prepare a world for a case, and learn from undisturbed runs what is to be expected; of two,
    that they come to the same.
    """
    world = make_world(materials, folder)
    for part in ("uv-cache", "tmp"):
        (folder / part).mkdir()
    world.env |= {"UV_CACHE_DIR": str(folder / "uv-cache"), "TMPDIR": str(folder / "tmp")}
    compile_below(world.root / "workspace")
    case.prepare(world)
    place = Place(case, world, ledger)
    place.keep()
    for number in range(runs):
        place.restore()
        started = time.monotonic()
        ended = world.run(*case.argv)
        place.undisturbed_s = time.monotonic() - started
        assert ended.code == case.code, ended.output
        if case.again:
            case.go_on(world)
        found = judge.fingerprint(world.layout, world.folder / "cache")
        if number:
            assert not judge.differences(place.expected, found), judge.differences(
                place.expected, found
            )
        place.expected = found
        case.check(world)
    return place


def by_launcher(place: Place, limit: int, delay: str) -> Kill:
    """Kill the verb's own process at its `limit`-th changing call; 0 lets it run."""
    world = place.world
    log = world.folder / "calls"
    child = world.start(
        *place.case.argv,
        through=[
            sys.executable,
            "-Es",
            "-B",
            str(Path(launcher.__file__)),
            str(log),
            str(limit),
            delay,
        ],
    )
    child.communicate(timeout=120)
    lines = log.read_text().splitlines() or ["0 none"]
    after = "" if delay == "before" else f", {delay} s after it started"
    quiet_s, living = judge.await_no_stray(place.mark)
    _refuse_strays(living)
    return Kill(f"call {limit} of the verb: {lines[-1]}{after}", child.returncode, quiet_s)


def judged(place: Place, kind: str, kill: Callable[[], Kill]) -> Result:
    """Put the world back, kill, run the verb again, and hold what came of it against what should
    have.
    """
    started = time.monotonic()
    place.restore()
    where = "before the kill"
    complaints: list[str] = []
    leftovers, was_seen = 0, False
    try:
        done = kill()
        where = done.place
        state = _state(place.world)
        was_seen = state in place.seen
        if not was_seen:
            complaints = complete(place)
            leftovers = len(list((place.world.folder / "tmp").iterdir()))
        if not complaints:
            place.seen.add(state)
    except (AssertionError, subprocess.TimeoutExpired, RuntimeError, OSError) as exc:
        complaints = [f"{type(exc).__name__}: {exc}"]
    finally:
        place.world.end()
    return Result(
        place.case.name,
        kind,
        where,
        tuple(complaints),
        time.monotonic() - started,
        was_seen,
        leftovers,
    )


def complete(place: Place) -> list[str]:
    """Go on as a user would; say everything that is not as after an undisturbed run."""
    try:
        place.case.go_on(place.world)
    except AssertionError as exc:
        return [str(exc)]
    complaints = judge.differences(
        place.expected, judge.fingerprint(place.world.layout, place.world.folder / "cache")
    )
    try:
        place.case.check(place.world)
    except (AssertionError, RuntimeError, OSError) as exc:
        complaints.append(f"the user's work: {exc!r}")
    return complaints


def failed_rightly(ended: Ended, codes: Iterable[int]) -> list[str]:
    """What is wrong with the way in which a verb reported a failure: it has a sentence, a hint, a
    code of the table and no traceback.
    """
    wrong = []
    if ended.code not in codes:
        wrong.append(f"exit {ended.code}, expected one of {sorted(codes)}: {ended.output}")
    if "Traceback" in ended.err:
        wrong.append(f"a traceback: {ended.err}")
    if ended.code > 0 and "\nerror: " not in f"\n{ended.err}":
        wrong.append(f"no sentence: {ended.err}")
    return wrong


def each(
    places: list[Place], work: Callable[[Place, int], Result | None], numbers: Iterable[int]
) -> list[Result]:
    """Do the work for every number, side by side on the places given, until enough of them fail.
    Raises AssertionError where the time given ends before and none has failed.

    Each place takes the next few numbers: what comes of neighbours is often the same state, and
    that is run once by a place.
    """
    left = list(numbers)
    size = max(1, min(CHUNK, len(left) // (4 * len(places))))
    chunks = iter([left[at : at + size] for at in range(0, len(left), size)])
    lock = threading.Lock()
    results: list[Result] = []
    ledger = places[0].ledger
    cut = threading.Event()

    def worker(place: Place) -> None:
        while True:
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            for number in chunk:
                if ledger.is_over:
                    cut.set()
                if cut.is_set() or failed(tuple(results)) >= ENOUGH_FAILURES:
                    return
                result = work(place, number)
                if result:
                    results.append(replace(result, number=number))
                    ledger.take(results[-1])

    started = time.monotonic()
    with ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(worker, place) for place in places]
        while wait(futures, timeout=REPORT_EVERY_S).not_done:
            last = f", {results[-1].kind}" if results else ""
            ledger.info(
                f"{places[0].case.name}{last}: {len(results)} of {len(left)},"
                f" {failed(tuple(results))} failed, {time.monotonic() - started:.0f} s"
            )
        for future in futures:
            future.result()
    # Complaints are the caller's to report.
    assert failed(tuple(results)) or not cut.is_set(), (
        f"the time given by --for was over after {len(results)} of {len(left)}"
    )
    return results


def _state(world: World) -> str:
    """The content of everything that the next run may look at, so that equal states are run once.
    Names drawn at random count as equal.
    """
    digest = hashlib.sha256()
    for part in ("clone", "cache"):
        for place, folders, names in os.walk(world.folder / part):
            folders[:] = sorted(name for name in folders if name not in ("logs", "__pycache__"))
            for name in sorted((*folders, *names)):
                path = Path(place, name)
                stat = path.lstat()
                digest.update(f"{path.relative_to(world.folder)} {stat.st_mode} ".encode())
                if path.is_symlink():
                    digest.update(os.readlink(path).encode())
                elif path.is_file() and name != "lock":
                    digest.update(path.read_bytes())
    return digest.hexdigest()


def _refuse_strays(living: list[str]) -> None:
    assert not living, f"still alive {judge.STRAY_S:g} s after the kill: {living}"
