"""One thing has one word, the field's: words of the first edition do not come back.

Identifiers and texts are compared with two lists, which stand here and nowhere else;
docs/glossary.md has the words to use. Run as a program, it checks the paths that are named:
`python -m tests.test_words workspace/repo`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parsed import parse

ROOT = Path(__file__).resolve().parents[1]
# A part of an identifier, as `said` in `_said_of`: what to write instead.
IDENTIFIERS = {
    "annex": "sandbox",
    "aside": "quarantine, scratch",
    "asked": "options, requested",
    "broker": "job server",
    "busy": "allow_busy, loaded machine",
    "catalogue": "registry",
    "course": "bisect log",
    "cure": "hint",
    "deed": "commit stats",
    "donor": "precompiled",
    "door": "cli, main, entrance",
    "duel": "interleaved run",
    "fight": "interleaved run",
    "goods": "known-good states",
    "ground": "context",
    "hear": "read",
    "heard": "output",
    "journal": "run log",
    "keeper": "supervisor",
    "kin": "process tree",
    "ladder": "fallbacks",
    "leavings": "leftovers",
    "listfile": "CMake parser",
    "mend": "fix, repair",
    "mended": "fixed",
    "outrun": "sources changed",
    "question": "predicate",
    "remedies": "fixes",
    "remedy": "fix",
    "replies": "HTTP checks",
    "rung": "next step",
    "said": "output, message, reported",
    "say": "report, print",
    "shop": "sandbox",
    "surroundings": "environment",
    "tell": "report",
    "ticket": "job token",
    "tickets": "job tokens",
    "told": "reported",
    "undonated": "not precompiled",
    "whereabouts": "server state",
    "wholeness": "installed-files check",
    "word": "token, argument",
    "words": "argv, args, tokens",
    "workshop": "sandbox",
    "young": "recent",
}
# Names of others, and of the field.
ALLOWED = {
    "tie_word_embeddings",
    "break_long_words",
    "stop_words",
    # The flag --allow-busy, and its help.
    "allow_busy",
    "busy_help",
}
# In a text that a person reads.
TEXTS = {
    r"donors?('s)?": "precompiled wheel",
    r"annex|workshop": "sandbox",
    r"arms?": "sandbox; `arm` only for the A and the B of an A/B",
    r"cures?|cured|remed(y|ies)": "hint, fix",
    r"mends?|mended|mending": "fix",
    r"leavings": "leftovers",
    r"wholeness": "installed-files check",
    r"whereabouts": "server state",
    r"outrun": "changed since the wheel",
    r"rungs?|ladders?": "next step, fallbacks",
    r"keeper": "supervisor",
    r"kin": "process tree",
    r"deeds?": "commit stats",
    r"duel": "interleaved run",
    r"journal": "run log",
    r"tickets?": "job token",
    r"told|tells?|hears?|heard": "report, print, read",
    r"said|says": "reports, prints; or leave it out",
    r"door": "command line, entrance",
    r"goes on|go on|gone on|went on": "resume, continue",
}
ANY_TEXT = re.compile("|".join(TEXTS))
# Where statistics call it so.
ARMS = (
    "workspace/bench/",
    "docs/ab.md",
    "docs/benchmarks.md",
    "docs/evidence/benchmarks.md",
    "docs/glossary.md",
)


def parts(name: str) -> list[str]:
    """`_said_of` and `SaidOf` have the parts said and of."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a module gives to a variable, argument, attribute, function or class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string with a blank in it: sentences, hints, help and docstrings."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and " " in node.value.strip()
        ):
            yield node.lineno, node.value


def complaints_of_module(source: str, path: str) -> list[str]:
    tree = parse(source)
    found = []
    for line, name in identifiers(tree):
        found += [
            f"{path}:{line}: {name}: write {IDENTIFIERS[part]}"
            for part in parts(name)
            if part in IDENTIFIERS and name not in ALLOWED
        ]
    for line, text in texts(tree):
        found += [f"{path}:{line}: {complaint}" for complaint in complaints_of_text(text, path)]
    return found


def complaints_of_text(text: str, path: str) -> list[str]:
    if not ANY_TEXT.search(text):
        return []
    is_about_arms = path.startswith(ARMS)
    return [
        f"“{match[0]}”: write {instead}"
        for pattern, instead in TEXTS.items()
        if not (is_about_arms and pattern == r"arms?")
        for match in re.finditer(rf"(?<![\w`/.-])(?:{pattern})(?![\w/-])", text)
    ]


def modules(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in ([ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py"))
    )


def pages() -> list[Path]:
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "patches" / "README.md",
        ROOT / "recipes" / "README.md",
        ROOT / ".env.example",
        ROOT / ".ci" / "run",
        ROOT / "scripts" / "inv",
        ROOT / "scripts" / "nox",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


# docs/screens.md shows screens of the first edition as they were.
FORMER_SCREEN = re.compile(r"<!-- the first edition -->\n```text\n.*?\n```", re.DOTALL)


def complaints(paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        text, shown = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        if path.suffix == ".py":
            found += complaints_of_module(text, shown)
            continue
        text = FORMER_SCREEN.sub(lambda screen: "\n" * screen[0].count("\n"), text)
        for number, line in enumerate(text.splitlines(), start=1):
            found += [f"{shown}:{number}: {one}" for one in complaints_of_text(line, shown)]
    return found


def test_library_uses_the_fields_words() -> None:
    found = complaints(modules("workspace", "scripts", "tasks.py", "noxfile.py"))
    assert found == [], "\n".join(found)


def test_pages_use_the_fields_words() -> None:
    found = complaints(pages())
    assert found == [], "\n".join(found)


def test_files_are_called_by_the_fields_words() -> None:
    names = [
        str(path.relative_to(ROOT))
        for folder in ("docs", "patches", "recipes", "scripts", "tests", "workspace")
        for path in (ROOT / folder).rglob("*")
        if path != Path(__file__) and path.suffix != ".pyc"
    ]
    found = [
        f"{name}: write {IDENTIFIERS[part]}"
        for name in names
        for part in parts(name)
        if part in IDENTIFIERS
    ]
    assert len(names) > 300
    assert found == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("said = 1", 1),
        ("def f(words): pass", 1),
        ("class Workshop: pass", 1),
        ("self.asked_for = 2", 1),
        ("x = 'no donor for it'", 1),
        ("x = f'the cure of {y} is'", 1),
        ("x = 'the arm of an A/B'", 1),
        ("output = 1", 0),
        ("x = 'donor'", 0),
        ("x = 'an army, a format'", 0),
        ("tie_word_embeddings = False", 0),
    ],
)
def test_former_words_are_seen(source: str, count: int) -> None:
    assert len(complaints_of_module(source, "workspace/repo/a.py")) == count


if __name__ == "__main__":
    print("\n".join(complaints(modules(*sys.argv[1:]))))
