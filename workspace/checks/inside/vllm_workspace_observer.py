"""A pytest plugin for the processes of upstream's tests: it marks failures that only lack the hub.

It also fails a run in which tests were lost with their process. An exception of the hub's library,
anywhere in the chain, is such a failure. vLLM swallows that exception in its most common case and
raises its own message; messages count only if the hub refused a request in the same test file.
"""

import re
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

# huggingface_hub.errors; datasets has one of the first name.
_KINDS = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
_LIBRARIES = ("huggingface_hub", "datasets")
# The messages after which upstream's own CPU job retries with a network
# (.buildkite/scripts/hardware_ci/run-cpu-test.sh, OFFLINE_RETRY_PATTERN).
_MESSAGES = re.compile(
    r"LocalEntryNotFoundError|OfflineModeIsEnabled|Invalid repository ID or local directory"
    r" specified|Cannot find any model weights with"
    r"|[Cc]ouldn't connect to 'https://huggingface\.co'|outgoing traffic has been disabled|Cannot"
    r" reach https://huggingface\.co"
    r"|Can't load tokenizer for '[\w.-]+/|in the cached files and it looks like .* is not the path"
)
# The only attribute of a report that pytest's JUnit file (xunit1) takes for a test and for a file
# that cannot be collected, and that xdist transfers.
MARK, VALUE = "url", "hub"
# The status of pytest's own errors (pytest.ExitCode.INTERNAL_ERROR).
FAILED = 3


class _Refusals:
    """The test files in which the hub refused a request; `now` is the file that runs."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.now = ""
        self._watched: list[type] = []

    def watch(self) -> None:
        """Note when the hub's exceptions are created, once its library is loaded.

        A test that does not use the library must not load it.
        """
        errors = sys.modules.get("huggingface_hub.errors")
        for kind in (vars(errors).get(name) for name in _KINDS) if errors else ():
            if isinstance(kind, type) and kind not in self._watched:
                self._watch(kind)

    def _watch(self, kind: type) -> None:
        self._watched.append(kind)
        former = kind.__init__  # type: ignore[misc]

        def noted(exception: BaseException, *args: object, **named: object) -> None:
            self.files.add(self.now)
            former(exception, *args, **named)

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
        # In case the process dies here.
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


class _LostTests:
    """Detects tests that did not run, which xdist does not report.

    A process that dies at an import is restarted some times, and then exits with 5.
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
        config.pluginmanager.register(_LostTests(config))


def _process(node: object) -> str:
    return str(node.gateway.id)  # type: ignore[attr-defined]


def _note(config: pytest.Config) -> Path | None:
    """Return the file with the name of what is being collected, beside the report."""
    report = getattr(config.option, "xmlpath", None)
    return Path(report).with_name("collecting") if report else None


def _wants_hub(failure: BaseException, file: str) -> bool:
    chain = list(_chain(failure))
    is_own = any(
        kind.__name__ in _KINDS and kind.__module__.partition(".")[0] in _LIBRARIES
        for exception in chain
        for kind in type(exception).__mro__
    )
    return is_own or (
        file in _refusals.files and any(_MESSAGES.search(str(exception)) for exception in chain)
    )


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its causes and contexts, and those in a group."""
    seen: list[BaseException] = []
    waiting = [failure]
    while waiting:
        exception = waiting.pop()
        if exception in seen:
            continue
        seen.append(exception)
        yield exception
        before = exception.__cause__ or (
            None if exception.__suppress_context__ else exception.__context__
        )
        waiting += [before] if before else []
        waiting += exception.exceptions if isinstance(exception, BaseExceptionGroup) else ()


def _file(node: str) -> str:
    return node.partition("::")[0]
