"""Options, worlds kept for the whole session, and the table at its end."""

import contextlib
import dataclasses
import random
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.proof.kill.cases import KillCase
from tests.proof.kill.harness import Place, compile_below, make_places, workers
from tests.proof.kill.ledger import Ledger, Result
from tests.small import releases
from tests.small.index import serve
from tests.small.materials import Materials

LEDGER = pytest.StashKey[Ledger]()
SEED = pytest.StashKey[int]()
Grounds = Callable[[KillCase], list[Place]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kill")
    group.addoption(
        "--seed",
        type=int,
        default=None,
        help="the seed of everything drawn at random; drawn itself and printed where not given",
    )
    group.addoption(
        "--times",
        type=int,
        default=20,
        help="kills at random moments of each verb, on the small tree or the real one",
    )
    group.addoption(
        "--every",
        type=int,
        default=1,
        help="kill at every so many-th call only; 1 takes hours even on many cores",
    )
    group.addoption(
        "--workers",
        type=int,
        default=None,
        help="worlds worked on side by side; as many as there are cores, where not given",
    )
    group.addoption(
        "--for",
        dest="seconds",
        type=float,
        default=float("inf"),
        help="begin nothing new after so many seconds; a test that has not done all then fails",
    )
    group.addoption(
        "--part",
        type=share,
        default=(1, 1),
        metavar="I/N",
        help="the I-th of N shares of the kills; all N together are each of them once",
    )
    group.addoption(
        "--record",
        type=Path,
        default=None,
        help="append a line of JSON for each kill; what the file has already is not done again",
    )


def share(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise ValueError(text)
    return int(number), int(of)


def pytest_configure(config: pytest.Config) -> None:
    def given(name: str, default: object) -> Any:
        return config.getoption(name, default=default)

    def info(line: str) -> None:
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            config.pluginmanager.getplugin("terminalreporter").write_line(f"kill: {line}")

    until = time.monotonic() + given("seconds", float("inf"))
    config.stash[LEDGER] = Ledger(
        given("--every", 1), given("--part", (1, 1)), until, given("--record", None), info
    )
    config.stash[LEDGER].load()
    # A shell's background job ignores SIGINT, and so would the verbs that are to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = given("--seed", None)
    config.stash[SEED] = random.SystemRandom().randrange(1 << 32) if seed is None else seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"kill: seed {config.stash[SEED]}"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.stash[SEED]


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Ledger:
    return request.config.stash[LEDGER]


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--times", default=20))


@pytest.fixture(scope="session")
def slots(materials: Materials, request: pytest.FixtureRequest) -> Iterator[list[Materials]]:
    """The materials once for each worker: all the same but for the index, whose server is the
    worker's own.
    """
    compile_below(Path(sysconfig.get_path("purelib")))
    # Made by the first who asks, which must not be several at once.
    releases.make(materials)
    with contextlib.ExitStack() as stack:
        count = request.config.getoption("--workers", default=None) or workers()
        yield [
            dataclasses.replace(materials, index=stack.enter_context(serve(materials.wheels)))
            for _ in range(count)
        ]


@pytest.fixture(scope="session")
def grounds(
    slots: list[Materials], tmp_path_factory: pytest.TempPathFactory, ledger: Ledger
) -> Grounds:
    """The places of a case, made once a session: one for each worker."""
    made: dict[str, list[Place]] = {}

    def of(case: KillCase) -> list[Place]:
        if ledger.is_over:
            pytest.fail("the time given by --for was over before it began")
        if case.name not in made:
            made[case.name] = make_places(
                case, slots, [tmp_path_factory.mktemp("place") for _ in slots], ledger
            )
        return made[case.name]

    return of


@pytest.fixture
def judge_all(ledger: Ledger) -> Callable[[list[Result]], None]:
    """Keep results for the table, and fail with every complaint."""

    def take(results: list[Result]) -> None:
        ledger.take_rest(results)
        wrong = [
            f"{result.kind} of {result.case}, {result.place}{alone(ledger, result)}:\n  "
            + "\n  ".join(result.complaints)
            for result in results
            if result.complaints
        ]
        assert not wrong, "\n".join(wrong)

    return take


def alone(ledger: Ledger, result: Result) -> str:
    """How to do this kill and no other of its test: a share so small that it has one call."""
    return (
        f" (alone: --part {result.number + 1}/1000000)"
        if (result.kind, result.case) in ledger.calls
        else ""
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    ledger = config.stash[LEDGER]
    if ledger.results or ledger.calls:
        terminalreporter.section(f"kills, seed {config.stash[SEED]}")
        for line in ledger.table():
            terminalreporter.line(line)
