"""Which of upstream's test files run on this machine, by the tree's own word: what its continuous integration runs on CPUs, and what a test is marked with.

The lists lie in .buildkite as YAML; of it only a step's label, device and pytest lines are read, in the form in which upstream writes them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.upstream.reach import Rules, nearest

LISTS = ("test_areas/*.yaml", "hardware_tests/cpu.yaml")
# Of a test that is run on a CPU although its file is run on a GPU (pyproject.toml, tool.pytest.ini_options.markers).
MARKER = "cpu_test"
How = Literal["whole", "marked", "not"]
_STEP = re.compile(r"^- (?=label:)", re.MULTILINE)
_KEY = re.compile(r"^  (\w+):(.*(?:\n(?:   .*|  - .*|  #.*|[ \t]*$))*)", re.MULTILINE)
_CPU = re.compile(r"\s*(?:intel_|arm_)?cpu\b")
_WORD = re.compile(r"""'[^']*'|"[^"]*"|[^\s'"]+""")


@dataclass(frozen=True)
class Listed:
    """A line of upstream's lists: a file or folder, relative to the tree, and the expression of marks that it is run with, or none."""

    path: str
    marks: str


@dataclass(frozen=True)
class Decision:
    """How a test file is run here, `marked` meaning only the tests with MARKER, and why it is not, or by whose word it is."""

    how: How
    why: str


def cpu_lists(tree: Path) -> tuple[Listed, ...]:
    """Read what upstream runs on CPUs; nothing where the tree has no .buildkite."""
    files = [file for pattern in LISTS for file in sorted((tree / ".buildkite").glob(pattern))]
    return tuple(dict.fromkeys(one for file in files for one in listed(file.read_text(encoding="utf-8", errors="replace"))))


def listed(text: str) -> tuple[Listed, ...]:
    """Read one file of steps."""
    found: list[Listed] = []
    for step in _STEP.split(text)[1:]:
        # What stands under a step's `mirror` is for other machines, and further to the right.
        keys: dict[str, str] = dict(_KEY.findall(f"  {step}"))
        if _CPU.match(keys.get("device", "")) or keys.get("no_gpu", "").strip() == "true":
            for line in keys.get("commands", "").replace("\\\n", " ").splitlines():
                found += _of_command(line)
    return tuple(found)


def _of_command(line: str) -> list[Listed]:
    # What follows a # is a remark, or a line that was taken out.
    words = _WORD.findall(re.sub(r"(^|\s)#.*", "", line).partition("pytest ")[2])
    marks, paths = "", []
    before = ""
    for word in words:
        if before == "-m":
            marks = word.strip("'\"")
        elif before != "--ignore" and not word.startswith("-") and "::" not in word and re.fullmatch(r"[\w./-]+", word):
            # Steps are run in tests/, those of hardware_tests above it.
            paths.append(word if word.startswith("tests/") else f"tests/{word}")
        before = word
    return [Listed(path.rstrip("/"), marks) for path in paths]


def decide(tree: Path, path: str, lists: tuple[Listed, ...], known: Rules, *, device: str, try_all: bool) -> Decision:
    """Decide for one test file. On a GPU all are run: those that need more of them, or another, say so themselves."""
    if device == "cuda":
        return Decision("whole", "there is a GPU")
    whole = [one for one in lists if _covers(one.path, path)]
    if any(not one.marks for one in whole):
        return Decision("whole", "upstream runs it on CPUs")
    if rule := nearest(path, known.cpu):
        return Decision("whole", rule.why)
    if try_all:
        return Decision("whole", "tried on your word")
    if MARKER in (tree / path).read_text(encoding="utf-8", errors="replace"):
        return Decision("marked", f"the tests that upstream marks {MARKER}")
    if any("cpu_model" in one.marks for one in whole):
        return Decision("not", "upstream runs it on CPUs with models from the hub; --try-all --online runs it")
    return Decision("not", "it is in none of upstream's lists for CPUs; --try-all runs it")


def _covers(listed_path: str, path: str) -> bool:
    return path == listed_path or path.startswith(f"{listed_path}/")
