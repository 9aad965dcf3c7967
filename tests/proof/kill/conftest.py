"""Options, worlds kept for the whole session, and the table at its end."""

import collections
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proof.kill import preload
from tests.proof.kill.cases import KillCase
from tests.proof.kill.harness import WORKERS, Place, Result, make_place
from tests.small.materials import Materials

RESULTS = pytest.StashKey[list[Result]]()
SEED = pytest.StashKey[int]()
Grounds = Callable[[KillCase], list[Place]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kill")
    group.addoption("--seed", type=int, default=None, help="the seed of everything drawn at random; drawn itself and printed where not given")
    group.addoption("--times", type=int, default=20, help="kills on the real tree, and signals on the small one")
    group.addoption("--every", type=int, default=1, help="kill at every so many-th call only; 1 takes an hour or more on two cores")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    # A shell's background job ignores SIGINT, and so would the verbs that are to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = config.getoption("--seed", default=None)
    config.stash[SEED] = random.SystemRandom().randrange(1 << 32) if given is None else given


def pytest_report_header(config: pytest.Config) -> str:
    return f"kill: seed {config.stash[SEED]}"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.stash[SEED]


@pytest.fixture(scope="session")
def every(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--every", default=1))


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--times", default=20))


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = preload.build(tmp_path_factory.mktemp("shim"))
    if built is None:
        pytest.skip("no C compiler, so children cannot be counted")
    return built


@pytest.fixture(scope="session")
def grounds(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Grounds:
    """The places of a case, made once a session: one for each worker."""
    made: dict[str, list[Place]] = {}

    def of(case: KillCase) -> list[Place]:
        if case.name not in made:
            made[case.name] = [make_place(case, materials, tmp_path_factory.mktemp("place")) for _ in range(WORKERS)]
        return made[case.name]

    return of


@pytest.fixture
def judge_all(request: pytest.FixtureRequest) -> Callable[[list[Result]], None]:
    """Keep results for the table, and fail with every complaint."""

    def take(results: list[Result]) -> None:
        request.config.stash[RESULTS] += results
        wrong = [f"{result.kind} of {result.case}, {result.place}:\n  " + "\n  ".join(result.complaints) for result in results if result.complaints]
        assert not wrong, "\n".join(wrong)

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows: dict[tuple[str, str], list[Result]] = collections.defaultdict(list)
    for result in config.stash[RESULTS]:
        rows[result.kind, result.case].append(result)
    if not rows:
        return
    terminalreporter.section(f"kills, seed {config.stash[SEED]}")
    terminalreporter.line(f"{'how':32}{'what':48}{'kills':>6}{'states':>8}{'failed':>8}{'seconds':>9}{'left in TMPDIR':>16}")
    for (kind, case), results in rows.items():
        states = sum(not result.was_seen for result in results)
        failed = sum(bool(result.complaints) for result in results)
        seconds = sum(result.seconds for result in results)
        left = sum(result.leftovers for result in results)
        terminalreporter.line(f"{kind:32}{case:48}{len(results):6}{states:8}{failed:8}{seconds:9.0f}{left:16}")
    every = [result for results in rows.values() for result in results]
    terminalreporter.line(f"{len(every)} kills, {sum(bool(result.complaints) for result in every)} not completed rightly by the next run")
