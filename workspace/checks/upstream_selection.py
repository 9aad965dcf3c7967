"""Which of upstream's test files a changed file reaches, and by which way: each of them with the
reason.

It reads the tree and reach.toml, which is documented there; it runs nothing. A test that reaches a
change only through what else it imports is not found.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

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
    """The test files, the nearest first, and each changed file that reaches none, with the
    reason.
    """

    tests: tuple[Reached, ...]
    unreached: tuple[Reached, ...]


def rules(path: Path = RULES) -> Rules:
    """Read the rules that come with the workspace."""
    read = tomllib.loads(path.read_text(encoding="utf-8"))

    def listed(name: str) -> tuple[Rule, ...]:
        return tuple(
            Rule(one["path"], one["why"], tuple(one.get("tests", ()))) for one in read[name]
        )

    return Rules(
        read["renamed"],
        listed("map"),
        listed("none"),
        listed("cpu"),
        tuple(one["name"] for one in read["requirements"]),
    )


def nearest(path: str, among: Iterable[Rule]) -> Rule | None:
    """The rule with the longest beginning of `path`."""
    return max(
        (rule for rule in among if path.startswith(rule.path)),
        key=lambda rule: len(rule.path),
        default=None,
    )


def test_files(tree: Path) -> tuple[str, ...]:
    """All of upstream's test files, relative to the tree."""
    return tuple(
        sorted(str(file.relative_to(tree)) for file in (tree / "tests").rglob("test_*.py"))
    )


def find(tree: Path, changed: Sequence[str], known: Rules) -> Reach:
    """Find what each of the changed paths, relative to the tree, reaches. A test that several reach
    has the nearest way's reason.
    """
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
    """A test file that was changed, or what the tests of its folder share; what all tests share is
    left to who asks for all.
    """
    folder = str(PurePosixPath(path).parent)
    if path in there:
        yield Reached(path, "was changed itself")
    elif path.startswith("tests/") and path.endswith(".py") and folder != "tests":
        yield from (
            Reached(test, f"shares {path}") for test in there if test.startswith(f"{folder}/")
        )


def _mirrored(path: str, there: Sequence[str], known: Rules) -> Iterator[Reached]:
    """vllm/a/b.py is tested by tests/a/test_b.py, by what lies below tests/a/b, or by the test_b.py
    of the nearest folder above.
    """
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
    """The tests that lie in the nearest folder that mirrors that of the file; for what nothing else
    reaches.
    """
    if not _module(path):
        return
    folders, _ = _mirror(path, known)
    for end in range(len(folders), 1, -1):
        folder = "/".join(folders[:end])
        if beside := [test for test in there if str(PurePosixPath(test).parent) == folder]:
            yield from (
                Reached(test, f"lies in {folder}, as {path} has no test of its own")
                for test in beside
            )
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
    """The tests that name a module: in an import, or in the string with which they replace a part
    of it.
    """
    sought = [
        (path, name.rpartition(".")[2], _mention(name, is_package=path.endswith(f"{_PACKAGE}.py")))
        for path in changed
        if (name := _module(path))
    ]
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


LISTS = ("test_areas/*.yaml", "hardware_tests/cpu.yaml")
# Of a test that is run on a CPU although its file is run on a GPU (pyproject.toml,
# tool.pytest.ini_options.markers).
MARKER = "cpu_test"
How = Literal["whole", "marked", "not"]
_STEP = re.compile(r"^- (?=label:)", re.MULTILINE)
_KEY = re.compile(r"^  (\w+):(.*(?:\n(?:   .*|  - .*|  #.*|[ \t]*$))*)", re.MULTILINE)
_CPU = re.compile(r"\s*(?:intel_|arm_)?cpu\b")
_WORD = re.compile(r"""'[^']*'|"[^"]*"|[^\s'"]+""")


@dataclass(frozen=True)
class Listed:
    """A line of upstream's lists: a file or folder, relative to the tree, and the expression of
    marks that it is run with, or none.
    """

    path: str
    marks: str


@dataclass(frozen=True)
class Decision:
    """How a test file is run here, `marked` meaning only the tests with MARKER, and why it is not,
    or by whose word it is.
    """

    how: How
    why: str


def cpu_lists(tree: Path) -> tuple[Listed, ...]:
    """Read what upstream runs on CPUs; nothing where the tree has no .buildkite."""
    files = [file for pattern in LISTS for file in sorted((tree / ".buildkite").glob(pattern))]
    return tuple(
        dict.fromkeys(
            one
            for file in files
            for one in listed(file.read_text(encoding="utf-8", errors="replace"))
        )
    )


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
        elif (
            before != "--ignore"
            and not word.startswith("-")
            and "::" not in word
            and re.fullmatch(r"[\w./-]+", word)
        ):
            # Steps are run in tests/, those of hardware_tests above it.
            paths.append(word if word.startswith("tests/") else f"tests/{word}")
        before = word
    return [Listed(path.rstrip("/"), marks) for path in paths]


def decide_runnable(
    tree: Path, path: str, lists: tuple[Listed, ...], known: Rules, *, device: str, try_all: bool
) -> Decision:
    """Decide for one test file. On a GPU all are run: those that need more of them, or another, say
    so themselves.
    """
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
        return Decision(
            "not", "upstream runs it on CPUs with models from the hub; --try-all --online runs it"
        )
    return Decision("not", "it is in none of upstream's lists for CPUs; --try-all runs it")


def _covers(listed_path: str, path: str) -> bool:
    return path == listed_path or path.startswith(f"{listed_path}/")
