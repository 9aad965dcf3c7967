"""Which of upstream's test files a changed file reaches, and by which way: each of them with the reason.

It reads the tree and reach.toml, which is documented there; it runs nothing. A test that reaches a change only through what else it imports is not found.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

RULES = Path(__file__).with_name("reach.toml")
_PACKAGE = "__init__"


@dataclass(frozen=True)
class Rule:
    """What is known of all paths that begin with `path`: the tests, files or folders, and why."""

    path: str
    why: str
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What stands in reach.toml."""

    renamed: Mapping[str, str]
    map: tuple[Rule, ...]
    none: tuple[Rule, ...]
    cpu: tuple[Rule, ...]
    requirements: tuple[str, ...]


@dataclass(frozen=True)
class Reached:
    """A test file, relative to the tree, and why it was chosen."""

    path: str
    why: str


@dataclass(frozen=True)
class Reach:
    """The test files, the nearest first, and each changed file that reaches none, with the reason."""

    tests: tuple[Reached, ...]
    unreached: tuple[Reached, ...]


def rules(path: Path = RULES) -> Rules:
    """Read the rules that come with the workspace."""
    read = tomllib.loads(path.read_text(encoding="utf-8"))

    def listed(name: str) -> tuple[Rule, ...]:
        return tuple(Rule(one["path"], one["why"], tuple(one.get("tests", ()))) for one in read[name])

    return Rules(read["renamed"], listed("map"), listed("none"), listed("cpu"), tuple(one["name"] for one in read["requirements"]))


def nearest(path: str, among: Iterable[Rule]) -> Rule | None:
    """The rule with the longest beginning of `path`."""
    return max((rule for rule in among if path.startswith(rule.path)), key=lambda rule: len(rule.path), default=None)


def test_files(tree: Path) -> tuple[str, ...]:
    """All of upstream's test files, relative to the tree."""
    return tuple(sorted(str(file.relative_to(tree)) for file in (tree / "tests").rglob("test_*.py")))


def find(tree: Path, changed: Sequence[str], known: Rules) -> Reach:
    """Find what each of the changed paths, relative to the tree, reaches. A test that several reach has the nearest way's reason."""
    there = test_files(tree)
    mentioned = _mentions(tree, there, [path for path in changed if _module(path)])
    ways: tuple[Callable[[str], Iterator[Reached]], ...] = (
        lambda path: _itself(path, there),
        lambda path: _mirrored(path, there, known),
        lambda path: (Reached(test, f"names {_module(path)}") for test in mentioned.get(path, ())),
        lambda path: _mapped(path, there, known),
    )
    found: list[dict[str, str]] = [{} for _ in (*ways, None)]
    unreached = []
    for path in changed:
        before = sum(map(len, found))
        has_any = False
        for number, way in enumerate(ways):
            for one in way(path):
                has_any = True
                found[number].setdefault(one.path, one.why)
        if not has_any:
            for one in _beside(path, there, known):
                found[-1].setdefault(one.path, one.why)
        if not has_any and sum(map(len, found)) == before:
            unreached.append(Reached(path, _why_none(path, known)))
    chosen: dict[str, str] = {}
    for way_found in found:
        for test in sorted(way_found):
            chosen.setdefault(test, way_found[test])
    return Reach(tuple(Reached(test, why) for test, why in chosen.items()), tuple(unreached))


def _itself(path: str, there: Sequence[str]) -> Iterator[Reached]:
    """A test file that was changed, or what the tests of its folder share; what all tests share is left to who asks for all."""
    folder = str(PurePosixPath(path).parent)
    if path in there:
        yield Reached(path, "was changed itself")
    elif path.startswith("tests/") and path.endswith(".py") and folder != "tests":
        yield from (Reached(test, f"shares {path}") for test in there if test.startswith(f"{folder}/"))


def _mirrored(path: str, there: Sequence[str], known: Rules) -> Iterator[Reached]:
    """vllm/a/b.py is tested by tests/a/test_b.py, by what lies below tests/a/b, or by the test_b.py of the nearest folder above."""
    if not _module(path):
        return
    folders, stem = _mirror(path, known)
    if below := [test for test in there if test.startswith("/".join([*folders, stem, ""]))]:
        yield from (Reached(test, f"mirrors {path}") for test in below)
    for end in range(len(folders), 0, -1):
        name = "/".join([*folders[:end], f"test_{stem}.py"])
        if name in there:
            yield Reached(name, f"mirrors {path}")
            return


def _mapped(path: str, there: Sequence[str], known: Rules) -> Iterator[Reached]:
    rule = nearest(path, known.map)
    if rule:
        yield from (Reached(test, rule.why) for test in there if test.startswith(rule.tests))


def _beside(path: str, there: Sequence[str], known: Rules) -> Iterator[Reached]:
    """The tests that lie in the nearest folder that mirrors that of the file; for what nothing else reaches."""
    if not _module(path):
        return
    folders, _ = _mirror(path, known)
    for end in range(len(folders), 1, -1):
        folder = "/".join(folders[:end])
        if beside := [test for test in there if str(PurePosixPath(test).parent) == folder]:
            yield from (Reached(test, f"lies in {folder}, as {path} has no test of its own") for test in beside)
            return


def _why_none(path: str, known: Rules) -> str:
    if path.startswith("tests/") and path.endswith(".py"):
        return "every test may use it: --all-of tests runs them"
    if rule := nearest(path, known.none):
        return rule.why
    return "no test mirrors or names it, and reach.toml has no rule for it"


def _mirror(path: str, known: Rules) -> tuple[list[str], str]:
    """The folders below tests/ that correspond to those of a module, and the module's last name."""
    parts = list(PurePosixPath(path).with_suffix("").parts[1:])
    if parts[-1] == _PACKAGE and len(parts) > 1:
        parts.pop()
    return ["tests", *(known.renamed.get(part, part) for part in parts[:-1])], parts[-1]


def _module(path: str) -> str | None:
    """The dotted name of a module of vLLM, None for any other file."""
    if not (path.startswith("vllm/") and path.endswith(".py")):
        return None
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(f".{_PACKAGE}")


def _mentions(tree: Path, there: Sequence[str], changed: Sequence[str]) -> dict[str, list[str]]:
    """The tests that name a module: in an import, or in the string with which they replace a part of it."""
    sought = [(path, name.rpartition(".")[2], _mention(name, is_package=path.endswith(f"{_PACKAGE}.py"))) for path in changed if (name := _module(path))]
    found: dict[str, list[str]] = {}
    for test in there if sought else ():
        text = (tree / test).read_text(encoding="utf-8", errors="replace")
        for path, last, pattern in sought:
            # Most do not even have the word in them.
            if last in text and pattern.search(text):
                found.setdefault(path, []).append(test)
    return found


def _mention(name: str, *, is_package: bool) -> re.Pattern[str]:
    if is_package:
        return re.compile(rf"^\s*(?:from|import)\s+{re.escape(name)}(?![\w.])", re.MULTILINE)
    package, _, last = name.rpartition(".")
    listed = rf"^\s*from\s+{re.escape(package)}\s+import\s+(?:\([^)]*|[^(\n]*)\b{re.escape(last)}\b"
    return re.compile(rf"(?<![\w.]){re.escape(name)}(?!\w)|{listed}", re.MULTILINE)
