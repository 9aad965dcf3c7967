"""Architectures and version keys: text in, decisions out; no GPU and no toolkit is needed."""

import pytest

from workspace.machine import arch


@pytest.mark.parametrize(
    ("version", "key"),
    [("12.9", (12, 9)), ("3.13.0rc1", (3, 13, 0)), ("3.7.1+git12", (3, 7, 1)), ("soon", ())],
)
def test_key_ends_at_the_first_part_that_is_no_number(version: str, key: tuple[int, ...]) -> None:
    assert arch.key(version) == key


def test_list_is_read_with_every_separator_and_suffix() -> None:
    entries = arch.parse(" 9.0a;12.0f, 12.1 8.0+PTX")
    assert [(entry.number, entry.suffix, entry.has_ptx) for entry in entries] == [
        ("9.0", "a", False),
        ("12.0", "f", False),
        ("12.1", "", False),
        ("8.0", "", True),
    ]


@pytest.mark.parametrize(
    ("entry", "capability", "runs"),
    [
        ("12.0", "12.1", True),
        ("12.1", "12.0", False),
        ("12.0a", "12.1", False),
        ("12.1a", "12.1", True),
        ("12.0f", "12.1", True),
        ("9.0", "12.1", False),
        ("9.0+PTX", "12.1", True),
        ("9.0a+PTX", "12.1", False),
    ],
)
def test_code_runs_on_its_major_version_or_as_ptx(entry: str, capability: str, runs: bool) -> None:
    assert arch.runs_on(arch.parse(entry)[0], capability) is runs


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ("12.1", ("sm_121a", "8.8")),
        ("12.0", ("sm_120a", "8.7")),
        ("9.0", ("sm_90a", "8.0")),
        ("8.9", ("sm_89", "8.0")),
    ],
)
def test_probe_needs_no_newer_ptx_than_the_architecture(capability, target):
    assert arch.target_of(capability) == target
