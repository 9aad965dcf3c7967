"""Selection of upstream's test files: which of them a change reaches, and which run here.

It reads the tree and reach.toml and runs nothing. A test that reaches a change only through its
indirect imports is not found.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from workspace.core import records

RULES = Path(__file__).with_name("reach.toml")
_PACKAGE = "__init__"
# Marks a test that runs on CPUs in a file that runs on GPUs (pyproject.toml,
# tool.pytest.ini_options.markers).
MARKER = "cpu_test"
How = Literal["whole", "marked", "not"]


@dataclass(frozen=True)
class Rule:
    """A rule for all paths that begin with `path`: the reason, and the tests, files or folders."""

    path: str
    why: str
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """The content of reach.toml, which documents its own format."""

    renamed: Mapping[str, str]
    map: tuple[Rule, ...]
    none: tuple[Rule, ...]
    cpu: tuple[Rule, ...]
    requirements: tuple[str, ...]


@dataclass(frozen=True)
class Reached:
    """A file, relative to the tree, and the reason why it was chosen or reaches no test."""

    path: str
    why: str


@dataclass(frozen=True)
class Reach:
    """The test files, nearest first, and the changed files that reach none."""

    tests: tuple[Reached, ...]
    unreached: tuple[Reached, ...]


def rules() -> Rules:
    """Read the rules that come with the workspace."""
    table = records.convert(records.parse_toml(RULES.read_bytes()), dict[str, Any])

    def listed(name: str) -> tuple[Rule, ...]:
        return tuple(
            Rule(entry["path"], entry["why"], tuple(entry.get("tests", ())))
            for entry in table[name]
        )

    return Rules(
        table["renamed"],
        listed("map"),
        listed("none"),
        listed("cpu"),
        tuple(entry["name"] for entry in table["requirements"]),
    )


def nearest(path: str, among: Iterable[Rule]) -> Rule | None:
    """Return the rule whose `path` is the longest beginning of the given path."""
    return max(
        (rule for rule in among if path.startswith(rule.path)),
        key=lambda rule: len(rule.path),
        default=None,
    )


def test_files(tree: Path) -> tuple[str, ...]:
    """Return all of upstream's test files, relative to the tree."""
    return tuple(
        sorted(str(file.relative_to(tree)) for file in (tree / "tests").rglob("test_*.py"))
    )


def find(tree: Path, changed: Sequence[str], known: Rules) -> Reach:
    """Find the tests that the changed paths, relative to the tree, reach.

    A test that several paths reach has the reason of the nearest way.
    """
    all_tests = test_files(tree)
    mentioned = _mentions(tree, all_tests, [path for path in changed if _module(path)])
    ways: tuple[Callable[[str], Iterator[Reached]], ...] = (
        lambda path: _changed_or_shared(path, all_tests),
        lambda path: _mirrored(path, all_tests, known),
        lambda path: (Reached(test, f"names {_module(path)}") for test in mentioned.get(path, ())),
        lambda path: _mapped(path, all_tests, known),
    )
    # The reasons by test, nearest way first; the last is for paths that no other way reaches.
    found: list[dict[str, str]] = [{} for _ in (*ways, None)]
    unreached = []
    for path in changed:
        before = sum(map(len, found))
        direct = [(rank, test) for rank, way in enumerate(ways) for test in way(path)]
        beside = [(len(ways), test) for test in _beside(path, all_tests, known)]
        for rank, test in direct or beside:
            found[rank].setdefault(test.path, test.why)
        if not direct and sum(map(len, found)) == before:
            unreached.append(Reached(path, _why_none(path, known)))
    chosen: dict[str, str] = {}
    for reasons in found:
        for test_path in sorted(reasons):
            chosen.setdefault(test_path, reasons[test_path])
    return Reach(tuple(Reached(test, why) for test, why in chosen.items()), tuple(unreached))


def _changed_or_shared(path: str, all_tests: Sequence[str]) -> Iterator[Reached]:
    """Yield a changed test file, or all tests of a folder whose shared file changed.

    Files that all tests share count only with `--all-of`.
    """
    folder = str(PurePosixPath(path).parent)
    if path in all_tests:
        yield Reached(path, "was changed itself")
    elif path.startswith("tests/") and path.endswith(".py") and folder != "tests":
        yield from (
            Reached(test, f"shares {path}") for test in all_tests if test.startswith(f"{folder}/")
        )


def _mirrored(path: str, all_tests: Sequence[str], known: Rules) -> Iterator[Reached]:
    """Yield the tests that mirror a module vllm/a/b.py.

    They are tests/a/test_b.py and all below tests/a/b, else the test_b.py of the nearest parent
    folder.
    """
    if not _module(path):
        return
    folders, stem = _mirror(path, known)
    if below := [test for test in all_tests if test.startswith("/".join([*folders, stem, ""]))]:
        yield from (Reached(test, f"mirrors {path}") for test in below)
    for end in range(len(folders), 0, -1):
        name = "/".join([*folders[:end], f"test_{stem}.py"])
        if name in all_tests:
            yield Reached(name, f"mirrors {path}")
            return


def _mapped(path: str, all_tests: Sequence[str], known: Rules) -> Iterator[Reached]:
    rule = nearest(path, known.map)
    if rule:
        yield from (Reached(test, rule.why) for test in all_tests if test.startswith(rule.tests))


def _beside(path: str, all_tests: Sequence[str], known: Rules) -> Iterator[Reached]:
    """Yield the tests of the nearest folder that mirrors the module's folder.

    Used for modules that no other rule reaches.
    """
    if not _module(path):
        return
    folders, _ = _mirror(path, known)
    for end in range(len(folders), 1, -1):
        folder = "/".join(folders[:end])
        if beside := [test for test in all_tests if str(PurePosixPath(test).parent) == folder]:
            yield from (
                Reached(test, f"lies in {folder}, as {path} has no test of its own")
                for test in beside
            )
            return


def _why_none(path: str, known: Rules) -> str:
    if path.startswith("tests/") and path.endswith(".py"):
        return "every test may use it; --all-of tests runs them"
    if rule := nearest(path, known.none):
        return rule.why
    return "no test mirrors or names it, and reach.toml has no rule for it"


def _mirror(path: str, known: Rules) -> tuple[list[str], str]:
    """Return the folders below tests/ that mirror a module's, and the module's last name."""
    parts = list(PurePosixPath(path).with_suffix("").parts[1:])
    if parts[-1] == _PACKAGE and len(parts) > 1:
        parts.pop()
    return ["tests", *(known.renamed.get(part, part) for part in parts[:-1])], parts[-1]


def _module(path: str) -> str | None:
    """Return the dotted name of a module of vLLM, None for any other file."""
    if not (path.startswith("vllm/") and path.endswith(".py")):
        return None
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(f".{_PACKAGE}")


def _mentions(tree: Path, all_tests: Sequence[str], changed: Sequence[str]) -> dict[str, list[str]]:
    """Return the tests that name a module, in an import or in the string of a patch target."""
    sought = [
        (path, name.rpartition(".")[2], _mention(name, is_package=path.endswith(f"{_PACKAGE}.py")))
        for path in changed
        if (name := _module(path))
    ]
    found: dict[str, list[str]] = {}
    for test in all_tests if sought else ():
        text = (tree / test).read_text(encoding="utf-8", errors="replace")
        for path, last, pattern in sought:
            # A quick test first: most files do not contain the name at all.
            if last in text and pattern.search(text):
                found.setdefault(path, []).append(test)
    return found


def _mention(name: str, *, is_package: bool) -> re.Pattern[str]:
    if is_package:
        return re.compile(rf"^\s*(?:from|import)\s+{re.escape(name)}(?![\w.])", re.MULTILINE)
    package, _, last = name.rpartition(".")
    listed = rf"^\s*from\s+{re.escape(package)}\s+import\s+(?:\([^)]*|[^(\n]*)\b{re.escape(last)}\b"
    return re.compile(rf"(?<![\w.]){re.escape(name)}(?!\w)|{listed}", re.MULTILINE)


@dataclass(frozen=True)
class Decision:
    """How a test file runs here, and the reason; `marked` means only the tests with MARKER."""

    how: How
    why: str


def decide_runnable(tree: Path, path: str, known: Rules, *, device: str, try_all: bool) -> Decision:
    """Decide how one test file runs.

    With a GPU all files run: tests that need more or other GPUs skip themselves.
    """
    if device == "cuda":
        return Decision("whole", "there is a GPU")
    if rule := nearest(path, known.cpu):
        return Decision("whole", rule.why)
    if try_all:
        return Decision("whole", "tried because of --try-all")
    if MARKER in (tree / path).read_text(encoding="utf-8", errors="replace"):
        return Decision("marked", f"the tests that upstream marks {MARKER}")
    return Decision("not", f"it has no {MARKER} and no rule in reach.toml; --try-all runs it")
