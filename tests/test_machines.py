"""Tests that hold on every architecture for which wheels are released, read from their text: a
Spark runs them too.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small.wheels import LIBRARIES

TESTS = Path(__file__).parent
# The end of a path, as `folder / "_C_AVX2.abi3.so"`; a line of setup.py or of output is none.
PATH = re.compile(r"""/ ["'](\w+)\.abi3\.so["']""")
ANYWHERE = set[str]().union(*LIBRARIES.values())
EVERYWHERE = set[str].intersection(*map(set, LIBRARIES.values()))


def of_one_architecture(text: str) -> Iterator[str]:
    """Yield the libraries in a test's text that not every architecture's wheel has."""
    return (name for name in PATH.findall(text) if name in ANYWHERE - EVERYWHERE)


def test_no_test_reads_a_library_that_one_architecture_lacks() -> None:
    read = {
        str(file.relative_to(TESTS)): names
        for file in TESTS.rglob("*.py")
        if file.name != "test_machines.py" and (names := [*of_one_architecture(file.read_text())])
    }
    assert read == {}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('tree / "vllm" / "_C_AVX2.abi3.so"', ["_C_AVX2"]),
        ('tree / "vllm" / "_C.abi3.so"', []),
        ("LINE = '\"vllm/_C_AVX512.abi3.so\",'", []),
    ],
)
def test_such_a_library_is_found_in_a_line(line: str, found: list[str]) -> None:
    assert list(of_one_architecture(line)) == found
