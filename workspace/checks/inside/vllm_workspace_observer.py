"""A plugin of pytest that runs in the processes of upstream's tests: it marks the failures that say
nothing but that the hub is out of reach, and lets no run end well in which tests were lost with
their process.

An exception of the hub's own, wherever in the chain, is one. vLLM swallows that exception in its
most common case and raises a sentence of its own; words count only where the hub was asked for
something in the same test file, and refused.
"""

import re
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

# huggingface_hub.errors; datasets has one of the first name.
_KINDS = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
_LIBRARIES = ("huggingface_hub", "datasets")
# Those after which upstream's own CPU job asks again with a network
# (.buildkite/scripts/hardware_ci/run-cpu-test.sh, OFFLINE_RETRY_PATTERN).
_WORDS = re.compile(
    r"LocalEntryNotFoundError|OfflineModeIsEnabled|Invalid repository ID or local directory"
    r" specified|Cannot find any model weights with"
    r"|[Cc]ouldn't connect to 'https://huggingface\.co'|outgoing traffic has been disabled|Cannot"
    r" reach https://huggingface\.co"
    r"|Can't load tokenizer for '[\w.-]+/|in the cached files and it looks like .* is not the path"
)
# The only mark of a report that pytest's own JUnit file (xunit1) takes over for a test as for a
# file that cannot be collected, and xdist carries.
MARK, VALUE = "url", "hub"
# As pytest itself for an error of its own (pytest.ExitCode.INTERNAL_ERROR).
FAILED = 3


class _Refusals:
    """In which test files the hub refused something so far; `now` is the one whose tests are
    running.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.now = ""
        self._watched: list[type] = []

    def watch(self) -> None:
        """Note from now on that the hub's exceptions are made, once its library is there: a test
        that does not use it shall not load it.
        """
        errors = sys.modules.get("huggingface_hub.errors")
        for kind in (vars(errors).get(name) for name in _KINDS) if errors else ():
            if isinstance(kind, type) and kind not in self._watched:
                self._watch(kind)

    def _watch(self, kind: type) -> None:
        self._watched.append(kind)
        former = kind.__init__  # type: ignore[misc]

        def noted(exception: BaseException, *words: object, **named: object) -> None:
            self.files.add(self.now)
            former(exception, *words, **named)

        kind.__init__ = noted  # type: ignore[misc]


_refusals = _Refusals()


def pytest_runtest_setup(item: pytest.Item) -> None:
    _refusals.now = _file(item.nodeid)
    _refusals.watch()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo and _wants_hub(call.excinfo.value, _file(item.nodeid)):
        vars(report)[MARK] = VALUE
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    if isinstance(collector, pytest.Module) and (note := _note(collector.config)):
        # Should this be the last that the process does.
        note.write_text(collector.nodeid, encoding="utf-8")
    report = yield
    call = vars(report).get("call")
    if (
        report.failed
        and call
        and call.excinfo
        and _wants_hub(call.excinfo.value, _file(collector.nodeid))
    ):
        vars(report)[MARK] = VALUE
    return report


class _Lost:
    """What xdist itself does not tell of tests that were not run. A process that dies at an import
    it starts anew, some times, and exits with 5.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._done_collecting: set[str] = set()
        self._collected: frozenset[str] = frozenset()
        self._reported: set[str] = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        self._done_collecting.add(_process(node))
        self._collected = frozenset(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reported.add(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object, error: object) -> None:
        if error and _process(node) not in self._done_collecting:
            note = _note(self._config)
            pytest.exit(
                "error: the process died while"
                f" {note.read_text() if note and note.is_file() else 'it was started'} was"
                " collected",
                FAILED,
            )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        left = self._collected - self._reported
        if left and session.exitstatus in (0, 1) and not self._config.option.maxfail:
            print(
                f"\nerror: {len(left)} of {len(self._collected)} tests were not run, as their"
                " process died too often"
            )
            session.exitstatus = FAILED


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lost(config))


def _process(node: object) -> str:
    return str(node.gateway.id)  # type: ignore[attr-defined]


def _note(config: pytest.Config) -> Path | None:
    """The file with the name of what is being collected, beside the report."""
    report = getattr(config.option, "xmlpath", None)
    return Path(report).with_name("collecting") if report else None


def _wants_hub(failure: BaseException, file: str) -> bool:
    chain = list(_chain(failure))
    is_own = any(
        kind.__name__ in _KINDS and kind.__module__.partition(".")[0] in _LIBRARIES
        for one in chain
        for kind in type(one).__mro__
    )
    return is_own or (file in _refusals.files and any(_WORDS.search(str(one)) for one in chain))


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """An exception, those that it was raised from or while, and those in a group."""
    seen: list[BaseException] = []
    waiting = [failure]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.append(one)
        yield one
        before = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        waiting += [before] if before else []
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


def _file(node: str) -> str:
    return node.partition("::")[0]
