"""Flags of `vllm serve`: which ones the pinned tree knows, read from its sources without importing
torch, and what to do about the others.

A flag that former releases had is dropped with a sentence; one that is unknown stops with the
nearest name. Whether a value is right is the parser's business, but for the few that cost a long
load before anybody says so.
"""

import ast
import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.machine import run_environment

# Classes whose fields become flags (vllm/entrypoints/**/cli_args.py, vllm/engine/arg_utils.py).
_FLAG_CLASS = re.compile(r"\w*(FrontendArgs|EngineArgs)")
_SHORT = re.compile(r"-[A-Za-z][A-Za-z]*")
_NUMBER = re.compile(r"-?\.?\d")
# Made by argparse, and by vLLM's own parser before argparse sees the words
# (vllm/utils/argparse_utils.py).
_ALWAYS, _ALWAYS_SHORT = ("--help", "--config"), ("-h", "-O")
SPOILED = "vendor/vllm holds no command line that can be read"


@dataclass(frozen=True)
class Flags:
    """What a tree knows. `names` are spelled with dashes; of these `switches` take no word and have
    a --no- form where they are `negatable`.
    """

    names: frozenset[str]
    switches: frozenset[str] = frozenset()
    negatable: frozenset[str] = frozenset()
    shorts: frozenset[str] = frozenset()

    def spelled(self, word: str) -> str | None:
        """The flag that a word such as --max_model_len=8, --a.b or --no-x is, as the tree spells
        it; None where it knows none such.

        The beginning of a single flag counts, as it does with argparse.
        """
        name = _name(word)
        if name in self.names or name in self.negated:
            return name
        begun = (
            [known for known in (*self.names, *self.negated) if known.startswith(name)]
            if "." not in word.split("=")[0]
            else []
        )
        return begun[0] if len(begun) == 1 and len(name) > len("--x") else None

    @property
    def negated(self) -> frozenset[str]:
        return frozenset(f"--no-{name.removeprefix('--')}" for name in self.negatable)


@dataclass(frozen=True)
class Judged:
    """Words that the tree's parser takes, and a sentence for each that was left out."""

    words: tuple[str, ...]
    dropped: tuple[str, ...] = ()


@dataclass
class _Reading:
    names: set[str] = field(default_factory=set)
    switches: set[str] = field(default_factory=set)
    negatable: set[str] = field(default_factory=set)
    shorts: set[str] = field(default_factory=set)
    fields: dict[str, str] = field(default_factory=dict)


def known(layout: Layout) -> Flags:
    """Read the flags of the tree in vendor/vllm. Raises ToolchainError where there is no tree, or
    none with a command line.
    """
    package = layout.vllm / "vllm"
    sources = [
        package / "engine" / "arg_utils.py",
        *sorted((package / "entrypoints").glob("*/cli_args.py")),
        package / "entrypoints" / "cli_args.py",
    ]
    reading = _Reading()
    for source in sources:
        with contextlib.suppress(FileNotFoundError):
            _read(_parsed(source), reading)
    if not reading.names:
        raise ToolchainError(SPOILED, hint="./scripts/inv bootstrap")
    for name in reading.names:
        annotation = reading.fields.get(name, "")
        if "bool" in annotation and "str" not in annotation and name not in reading.switches:
            reading.switches.add(name)
            reading.negatable.add(name)
    return Flags(
        *(
            frozenset(found)
            for found in (
                reading.names | set(_ALWAYS),
                reading.switches,
                reading.negatable,
                reading.shorts | set(_ALWAYS_SHORT),
            )
        )
    )


def flags_of(source: bytes) -> frozenset[str]:
    """The flags that a file of vLLM's command line defines: literals given to add_argument, and
    fields of its argument classes.
    """
    reading = _Reading()
    _read(run_environment.parsed(source), reading)
    return frozenset(reading.names | reading.fields.keys())


def judge(words: Sequence[str], flags: Flags) -> Judged:
    """Return the words of a command line that the tree takes. What is no flag stays as it is.

    Raises SettingsError for a flag that neither this tree nor a former release knows, naming those
    most like it.
    """
    kept: list[str] = []
    dropped: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word in ("-", "--") or _NUMBER.match(word):
            kept.append(word)
        elif not word.startswith("--"):
            kept.append(_short(word, flags))
        elif spelled := flags.spelled(word):
            kept.append(spelled + word[len(_written(word)) :])
        elif former := run_environment.removed_names("flags").get(_name(word)):
            count = 0 if "=" in word else former.values
            gone = " ".join([word, *left[:count]])
            del left[:count]
            dropped.append(f"{gone} is left out: it {former.sentence}")
        else:
            raise _unknown(word, flags)
    return Judged(tuple(kept), tuple(dropped))


def last(words: Sequence[str], name: str) -> str | None:
    """The value that counts of a flag in words that were judged: what follows it the last time,
    None where it is not there.
    """
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == name:
            found = following
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def args_of(name: str, value: object) -> list[str]:
    """Write one setting of a recipe as words: true is the bare flag, false its --no- form, a list
    several words, a table JSON.
    """
    import json

    flag = f"--{name.replace('_', '-')}" if "." not in name else f"--{name}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        return [flag, *(str(part) for part in value)]
    return [flag, str(value)]


def _short(word: str, flags: Flags) -> str:
    # argparse takes -q8 for -q 8, but -tp2 for a name of its own; -O3 and -cc.mode=3 are vLLM's own
    # forms.
    if _written(word) in flags.shorts or word[:2] in flags.shorts:
        return word
    raise _unknown(word, flags)


def _unknown(word: str, flags: Flags) -> SettingsError:
    name = _written(word) if word.startswith("--") else word
    alike = run_environment.spelled_alike(
        _name(word) if word.startswith("--") else word,
        [*flags.names, *flags.negated, *flags.shorts],
    )
    hint = (
        f"did you mean {' or '.join(alike)}?"
        if alike
        else ".vllm/bin/vllm serve --help=all    lists them"
    )
    return SettingsError(f"the pinned vLLM has no flag {name}", hint=hint)


def _written(word: str) -> str:
    """The part of a word that names a flag: up to a dot or an equals sign."""
    return re.split(r"[.=]", word, maxsplit=1)[0]


def _name(word: str) -> str:
    return _written(word).replace("_", "-")


def _parsed(source: Path) -> ast.Module:
    try:
        return run_environment.parsed(read_regular(source))
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise ToolchainError(
            f"{source} cannot be read: {exc.strerror}", hint="./scripts/inv status"
        ) from exc


def _read(tree: ast.Module, reading: _Reading) -> None:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
        ):
            _read_argument(node, reading)
        elif isinstance(node, ast.ClassDef) and _FLAG_CLASS.fullmatch(node.name):
            for name, annotation in _fields(node):
                reading.fields[name] = annotation
                # The fields of EngineArgs become flags by add_argument only; some have none.
                if "FrontendArgs" in node.name:
                    reading.names.add(name)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for part in node.body:
        if (
            isinstance(part, ast.AnnAssign)
            and isinstance(part.target, ast.Name)
            and not part.target.id.startswith("_")
        ):
            yield f"--{part.target.id.replace('_', '-')}", ast.unparse(part.annotation)


def _read_argument(node: ast.Call, reading: _Reading) -> None:
    words = [
        word.value
        for word in node.args
        if isinstance(word, ast.Constant) and isinstance(word.value, str)
    ]
    names = {word.replace("_", "-") for word in words if word.startswith("--")}
    reading.names |= names
    reading.shorts |= {word for word in words if _SHORT.fullmatch(word)}
    action = next(
        (ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "action"), ""
    )
    if "store_true" in action or "store_false" in action:
        reading.switches |= names
    elif "BooleanOptionalAction" in action:
        reading.switches |= names
        reading.negatable |= names
