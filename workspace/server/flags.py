"""Flags of `vllm serve` that the pinned tree knows, read from its sources without importing torch.

A flag of a former release is dropped with a sentence; an unknown flag is an error with the nearest
names. vLLM's parser checks the values.
"""

import ast
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workspace.core import hints
from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import similar
from workspace.machine import run_environment

# Classes whose fields become flags (vllm/entrypoints/**/cli_args.py, vllm/engine/arg_utils.py).
_FLAG_CLASS = re.compile(r"\w*(FrontendArgs|EngineArgs)")
_SHORT = re.compile(r"-[A-Za-z][A-Za-z]*")
_NUMBER = re.compile(r"-?\.?\d")
# Defined by argparse, and by vLLM's own parser, which runs before argparse
# (vllm/utils/argparse_utils.py).
_ALWAYS, _ALWAYS_SHORT = ("--help", "--config"), ("-h", "-O")
SPOILED = "no command line can be read from vendor/vllm"


@dataclass(frozen=True)
class Flags:
    """Flags that a tree knows. `names` are spelled with dashes; `switches` take no value, and those
    in `negatable` have a --no- form.
    """

    names: frozenset[str]
    switches: frozenset[str] = frozenset()
    negatable: frozenset[str] = frozenset()
    shorts: frozenset[str] = frozenset()

    def spelled(self, token: str) -> str | None:
        """Return the flag of a token such as --max_model_len=8, --a.b or --no-x as the tree spells
        it; None if the tree has no such flag.

        A prefix of exactly one flag counts, as with argparse.
        """
        name = _name(token)
        if name in self.names or name in self.negated:
            return name
        begun = (
            [known for known in (*self.names, *self.negated) if known.startswith(name)]
            if "." not in token.split("=")[0]
            else []
        )
        return begun[0] if len(begun) == 1 and len(name) > len("--x") else None

    @property
    def negated(self) -> frozenset[str]:
        """Return the --no- forms."""
        return frozenset(f"--no-{name.removeprefix('--')}" for name in self.negatable)


@dataclass(frozen=True)
class Judged:
    """Arguments that the tree's parser accepts, and a sentence for each that was left out."""

    args: tuple[str, ...]
    dropped: tuple[str, ...] = ()


@dataclass
class _Reading:
    names: set[str] = field(default_factory=set)
    switches: set[str] = field(default_factory=set)
    negatable: set[str] = field(default_factory=set)
    shorts: set[str] = field(default_factory=set)
    fields: dict[str, str] = field(default_factory=dict)


def known(layout: Layout) -> Flags:
    """Read the flags of the tree in vendor/vllm. Raises ToolchainError if it defines none."""
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
        raise ToolchainError(SPOILED, hint=hints.text("inv.bootstrap"))
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
    """Return the flags that a source file of vLLM defines: literals given to add_argument, and
    fields of argument classes.
    """
    reading = _Reading()
    _read(run_environment.parsed(source), reading)
    return frozenset(reading.names | reading.fields.keys())


def judge(args: Sequence[str], flags: Flags) -> Judged:
    """Return the arguments of a command line that the tree accepts, flags spelled as it does.

    Raises SettingsError for a flag that neither this tree nor a former release knows, with the
    nearest names as hint.
    """
    kept: list[str] = []
    dropped: list[str] = []
    remaining = list(args)
    while remaining:
        token = remaining.pop(0)
        if not token.startswith("-") or token in ("-", "--") or _NUMBER.match(token):
            kept.append(token)
        elif not token.startswith("--"):
            kept.append(_short(token, flags))
        elif spelled := flags.spelled(token):
            kept.append(spelled + token[len(_flag_part(token)) :])
        elif former := run_environment.removed_names("flags").get(_name(token)):
            count = 0 if "=" in token else former.values
            removed = " ".join([token, *remaining[:count]])
            del remaining[:count]
            dropped.append(f"{removed} is left out: it {former.sentence}")
        else:
            raise _unknown(token, flags)
    return Judged(tuple(kept), tuple(dropped))


def last(args: Sequence[str], name: str) -> str | None:
    """Return the last value of a flag in judged arguments, None if the flag is absent."""
    found = None
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        if arg == name:
            found = following
        elif arg.startswith(f"{name}="):
            found = arg.partition("=")[2]
    return found


def args_of(name: str, value: object) -> list[str]:
    """Return one setting of a recipe as arguments: true is the bare flag, false its --no- form, a
    list several arguments, a table JSON.
    """
    flag = f"--{name.replace('_', '-')}" if "." not in name else f"--{name}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        return [flag, *(str(part) for part in value)]
    return [flag, str(value)]


def _short(token: str, flags: Flags) -> str:
    # argparse reads -q8 as -q 8, but -tp2 as a name of its own; -O3 and -cc.mode=3 are vLLM's own
    # forms.
    if _flag_part(token) in flags.shorts or token[:2] in flags.shorts:
        return token
    raise _unknown(token, flags)


def _unknown(token: str, flags: Flags) -> SettingsError:
    name = _flag_part(token) if token.startswith("--") else token
    alike = similar(
        _name(token) if token.startswith("--") else token,
        [*flags.names, *flags.negated, *flags.shorts],
    )
    hint = (
        hints.text("core.did_you_mean", alike=" or ".join(alike))
        if alike
        else hints.text("server.all_flags")
    )
    return SettingsError(f"the pinned vLLM has no flag {name}", hint=hint)


def _flag_part(token: str) -> str:
    """Return the part of a token that names a flag: up to a dot or an equals sign."""
    return re.split(r"[.=]", token, maxsplit=1)[0]


def _name(token: str) -> str:
    return _flag_part(token).replace("_", "-")


def _parsed(source: Path) -> ast.Module:
    try:
        return run_environment.parsed(read_regular(source))
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise ToolchainError(
            f"{source} cannot be read: {exc.strerror}", hint=hints.text("inv.status")
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
                # A field of EngineArgs becomes a flag by add_argument only; some never do.
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
    literals = [
        arg.value
        for arg in node.args
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
    ]
    names = {literal.replace("_", "-") for literal in literals if literal.startswith("--")}
    reading.names |= names
    reading.shorts |= {literal for literal in literals if _SHORT.fullmatch(literal)}
    action = next(
        (ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "action"), ""
    )
    if "store_true" in action or "store_false" in action:
        reading.switches |= names
    elif "BooleanOptionalAction" in action:
        reading.switches |= names
        reading.negatable |= names
