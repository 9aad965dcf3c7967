"""A real pytest over a small tree: each failure, crash and hang is named."""

from pathlib import Path

from tests.checks.upstream.runs import place, run
from workspace.checks import upstream_trial
from workspace.checks.upstream_selection import Decision, Reached
from workspace.checks.upstream_trial import Outcome

TESTS = {
    "test_a.py": (
        "import os, pytest\n"
        "def test_fine(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.parametrize('x', ['a/b::c'])\n"
        "def test_odd(x): assert x == 'y'\n"
        "class TestIn:\n    def test_skip(self): pytest.skip('no GPU here')\n"
    ),
    "sub/test_broken.py": "import there_is_no_such_module\n",
    "sub/test_dies.py": "import os\ndef test_dies(): os._exit(3)\ndef test_after(): pass\n",
}


def test_every_test_has_its_outcome_and_one_that_kills_its_process_ends_no_other(
    tmp_path: Path,
) -> None:
    found = run(tmp_path, TESTS)
    assert {node: one.state for node, one in found.items()} == {
        "tests/test_a.py::test_fine": "passed",
        "tests/test_a.py::test_wrong": "failed",
        "tests/test_a.py::test_odd[a/b::c]": "failed",
        "tests/test_a.py::TestIn::test_skip": "skipped",
        "tests/sub/test_broken.py": "failed",
        "tests/sub/test_dies.py::test_dies": "failed",
        "tests/sub/test_dies.py::test_after": "passed",
    }
    assert "there_is_no_such_module" in found["tests/sub/test_broken.py"].message
    assert "crashed" in found["tests/sub/test_dies.py::test_dies"].message


# A small copy of the library; vLLM's own exception after it swallowed the library's; and tests that
# only imitate the messages.
HUB = {
    "../huggingface_hub/errors.py": (
        "class OfflineModeIsEnabled(ConnectionError): pass\nclass"
        " LocalEntryNotFoundError(FileNotFoundError):\n    def __init__(self, message):"
        " super().__init__(message)\n"
    ),
    "test_hub.py": (
        "import pytest\nfrom huggingface_hub.errors import LocalEntryNotFoundError,"
        " OfflineModeIsEnabled\ndef refused(): raise LocalEntryNotFoundError('outgoing traffic has"
        " been disabled')\ndef swallowed():\n    try: refused()\n    except OSError: pass\ndef"
        " test_itself(): raise OfflineModeIsEnabled('Cannot reach it')\ndef test_cause():\n    try:"
        " refused()\n    except OSError as exc: raise OSError('no tokenizer') from exc\ndef"
        " test_in_a_group():\n    try: refused()\n    except OSError as exc: raise"
        " ExceptionGroup('two', [ValueError(), exc])\ndef test_swallowed():\n    swallowed()\n   "
        " raise ValueError('Invalid repository ID or local directory specified: x/y')\ndef"
        " test_own_failure_after_a_refusal():\n    swallowed()\n    assert 1 == 2\ndef"
        " test_skipped():\n    try: refused()\n    except OSError: pytest.skip('no"
        " model')\n@pytest.fixture\ndef model(): refused()\ndef test_setup(model):"
        " pass\n@pytest.fixture\ndef late():\n    yield\n    refused()\ndef"
        " test_own_failure_and_a_refusal_later(late): assert 1 == 2\n"
    ),
    "test_words.py": (
        "class OfflineModeIsEnabled(Exception): pass\ndef test_name(): raise"
        " OfflineModeIsEnabled('Cannot reach https://huggingface.co')\ndef test_words(): raise"
        " ValueError('Invalid repository ID or local directory specified: x/y')\ndef"
        " test_assertion(): assert \"We couldn't connect to 'https://huggingface.co'\" =="
        " 'LocalEntryNotFoundError'\n"
    ),
    "test_collected.py": (
        "from huggingface_hub.errors import OfflineModeIsEnabled\nraise OfflineModeIsEnabled('x')\n"
    ),
    "test_not_collected.py": (
        "raise ValueError('OfflineModeIsEnabled: outgoing traffic has been disabled')\n"
    ),
}


def test_failure_counts_as_the_hubs_only_if_the_hub_refused_a_request(
    tmp_path: Path,
) -> None:
    found = run(tmp_path, HUB)
    lacking = {"test_itself", "test_cause", "test_in_a_group", "test_swallowed", "test_setup"}
    assert {node.rpartition("::")[2] for node, one in found.items() if one.asks_hub} == {
        *lacking,
        "tests/test_collected.py",
    }
    assert {one.state for one in found.values() if one.asks_hub} == {"failed"}
    own = {
        "test_own_failure_after_a_refusal",
        "test_own_failure_and_a_refusal_later",
        "test_name",
        "test_words",
        "test_assertion",
    }
    assert {
        node.rpartition("::")[2]
        for node, one in found.items()
        if one.state == "failed" and not one.asks_hub
    } == {*own, "tests/test_not_collected.py"}


def outcome(
    name: str, state: str = "failed", message: str = "assert 1 == 2", *, asks_hub: bool = False
) -> Outcome:
    return Outcome(f"tests/test_a.py::{name}", "tests/test_a.py", state, message, 1.0, asks_hub)  # type: ignore[arg-type]


def test_failure_counts_only_where_the_pin_does_not_fail_as_well() -> None:
    outcomes = [
        outcome("test_own"),
        outcome("test_pin"),
        outcome("test_hub", asks_hub=True),
        outcome("test_fine", "passed", ""),
    ]
    there = [
        outcome("test_pin"),
        outcome("test_own", "passed", ""),
        outcome("test_hub", asks_hub=True),
    ]
    found = upstream_trial.sort(outcomes, there, is_online=False)
    (check,) = upstream_trial.checks(
        [Reached("tests/test_a.py", "mirrors vllm/a.py")],
        {"tests/test_a.py": Decision("whole", "")},
        found,
    )
    assert (check.verdict, check.meaning) == ("fail", "mirrors vllm/a.py")
    assert check.problems == ("test_a.py::test_own: assert 1 == 2",)
    assert "1 fail on the pin too" in check.evidence
    assert "1 need the hub" in check.evidence
    online = upstream_trial.sort(outcomes, there[:2], is_online=True)
    assert [one.node.rpartition("::")[2] for one in online.own] == ["test_own", "test_hub"]


def test_change_that_makes_a_test_ask_the_hub_is_not_excused() -> None:
    asks = outcome("test_a", asks_hub=True)
    assert upstream_trial.sort([asks], [outcome("test_a", "passed", "")], is_online=False).own == (
        asks,
    )
    assert upstream_trial.sort([asks], [], is_online=False).own == (asks,)
    # Without a comparison, hundreds of tests ask the hub.
    assert upstream_trial.sort([asks], None, is_online=False).hub == (asks,)
    assert upstream_trial.sort([outcome("test_b")], None, is_online=False).hub == ()


def test_failure_in_an_unselected_file_is_not_lost() -> None:
    found = upstream_trial.sort(
        [outcome("test_own"), outcome("test_fine", "passed", "")], [], is_online=False
    )
    (check,) = upstream_trial.checks([], {}, found)
    assert (check.identifier, check.verdict, check.problems) == (
        "tests/test_a.py",
        "fail",
        ("test_a.py::test_own: assert 1 == 2",),
    )


def test_file_that_does_not_run_is_skipped_with_the_reason() -> None:
    (check,) = upstream_trial.checks(
        [Reached("tests/b.py", "x")],
        {"tests/b.py": Decision("not", "no GPU")},
        upstream_trial.sort([], [], is_online=False),
    )
    assert (check.verdict, check.evidence) == ("skipped", "not run: no GPU")


def test_failed_tests_run_on_the_pin_by_name_because_an_unknown_node_would_end_the_run(
    tmp_path: Path,
) -> None:
    place(tmp_path, {"test_a.py": ""})
    new = Outcome("tests/test_new.py::test_x", "tests/test_new.py", "failed", "", 0.0)
    odd = outcome("TestIn::test_odd[a/b::c]")
    assert upstream_trial.again([odd, outcome("test_b"), new], tmp_path) == (
        ("tests/test_a.py",),
        ("-k", "test_odd or test_b or test_x"),
    )
    uncollected = Outcome("tests/test_a.py", "tests/test_a.py", "failed", "", 0.0)
    assert upstream_trial.again([uncollected, odd], tmp_path) == (("tests/test_a.py",), ())


def test_pin_does_not_run_if_compiled_sources_differ() -> None:
    assert upstream_trial.is_comparable(["vllm/a.py", "csrc_not.py"])
    assert not upstream_trial.is_comparable(["vllm/a.py", "csrc/a.cu"])
