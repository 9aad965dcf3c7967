"""Flags of `vllm serve` that the pinned tree knows, read from its sources without importing torch.

A flag of a former release is dropped with a sentence; an unknown flag is an error with the nearest
names. vLLM's parser checks the values. Also the options that `inv serve` has itself.
"""

import ast
import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workspace.core import hints, records
from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.files import read_regular
from workspace.core.known_settings import is_relative
from workspace.core.paths import Layout, typed
from workspace.core.settings import similar
from workspace.machine import run_environment

# Classes whose fields become flags (vllm/entrypoints/**/cli_args.py, vllm/engine/arg_utils.py).
_FLAG_CLASS = re.compile(r"\w*(FrontendArgs|EngineArgs)")
_SHORT = re.compile(r"-[A-Za-z][A-Za-z]*")
_NUMBER = re.compile(r"-?\.?\d")
# Defined by argparse, and by vLLM's own parser, which runs before argparse
# (vllm/utils/argparse_utils.py).
_ALWAYS, _ALWAYS_SHORT = ("--help", "--config"), ("-h", "-O")
# Settings whose value is a path, and others that name something on the hub, in the tree or in the
# environment where no file has that name; flags and keys of their JSON (vllm/config, cli_args.py).
_PATHS = re.compile(r"\w+_(path|dir|file|keyfile|certfile|ca_certs|json)|cache_dir")
_NAMES = re.compile(
    r"(\w+_)?model|path|(\w+_)?tokenizer|hf_config_path|(\w+_)?lora_path|chat_template"
    r"|generation_config|default_mm_loras|\w+_parser_plugin"
)
# A path of a URL, a module, and what clients call the model.
_TEXTS = ("root_path", "kv_connector_module_path", "ec_connector_module_path", "served_model_name")
_DRAFTER = ("--speculative-config", "-sc")
# Files that vLLM reads in a folder; a tokenizer can be made from any of these.
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model*",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
)
CONFIGURATIONS = ("config.json", "params.json")
GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"
# The keys of these are names of the user's.
_MAPS = ("default_mm_loras", "model_class_overrides")
# Share of the GPU's memory.
SHARE = "--gpu-memory-utilization"
SPOILED = "no command line can be read from vendor/vllm"


@dataclass(frozen=True)
class ServeOptions:
    """Options of `inv serve`. `force`: serve although open to others without a key, or with too
    little memory. `server` is the name among the servers of this clone. `nodes` are the names of
    the nodes that serve together; `flags` and `environment` are those of this node's part: the
    flags go before the recipe's, the variables behind them.
    """

    name: str
    extra: tuple[str, ...] = ()
    dry_run: bool = False
    detach: bool = False
    force: bool = False
    server: str = ""
    port: str | None = None
    memory: str | None = None
    restart: str | None = None
    nodes: str = ""
    flags: Mapping[str, int | str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def own(self) -> tuple[str, ...]:
        """Return the flags of inv that belong to the server itself, as typed."""
        typed = {
            "--nodes": self.nodes,
            "--name": self.server,
            "--memory": self.memory,
            "--restart": self.restart,
        }
        return tuple(arg for flag, value in typed.items() if value for arg in (flag, value))

    def check(self) -> None:
        """Raise SettingsError for a value that cannot be used."""
        hint = hints.text("server.memory")
        if not re.fullmatch(r"\d*[1-9]\d*(\.\d+)?|0?\.\d+", self.memory or "1"):
            raise SettingsError(f"--memory: {self.memory!r} is not a number of GiB", hint=hint)
        if self.memory and last(self.extra, SHARE):
            raise SettingsError(f"--memory and {SHARE} are the same share twice", hint=hint)
        if not re.fullmatch(r"\d{1,3}", self.restart or "0"):
            problem = f"--restart: {self.restart!r} is not a whole number up to 999"
            raise SettingsError(problem, hint=hints.text("server.restart"))


@dataclass(frozen=True)
class Flags:
    """Flags that a tree knows. `names` are spelled with dashes; `switches` take no value, and those
    in `negatable` have a --no- form. `longs` has the long flag of a short one.
    """

    names: frozenset[str]
    switches: frozenset[str] = frozenset()
    negatable: frozenset[str] = frozenset()
    shorts: frozenset[str] = frozenset()
    longs: Mapping[str, str] = field(default_factory=dict)

    def long(self, token: str) -> str:
        """Return a flag in its long form, its value behind =: -tp is --tensor-parallel-size, and
        -O3 is --optimization-level=3.
        """
        head = _flag_part(token)
        if head in self.longs:
            return self.longs[head] + token[len(head) :]
        if not token.startswith("--") and token[:2] in self.longs:
            return f"{self.longs[token[:2]]}={token[2:]}"
        return token

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
    longs: dict[str, str] = field(default_factory=lambda: {"-O": "--optimization-level"})
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
        # Bootstrap makes a checkout that is missing, and leaves one that lacks files as it is.
        status = hints.text("core.git_status", folder=layout.relative(layout.vllm))
        is_there = (layout.vllm / ".git").exists()
        raise ToolchainError(SPOILED, hint=status if is_there else hints.text("inv.bootstrap"))
    for name in reading.names:
        annotation = reading.fields.get(name, "")
        if "bool" in annotation and "str" not in annotation and name not in reading.switches:
            reading.switches.add(name)
            reading.negatable.add(name)
    return Flags(
        frozenset(reading.names | set(_ALWAYS)),
        frozenset(reading.switches),
        frozenset(reading.negatable),
        frozenset(reading.shorts | set(_ALWAYS_SHORT)),
        reading.longs,
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


def typed_paths(args: Sequence[str], folder: Path | None = None) -> tuple[str, ...]:
    """Return arguments with absolute paths; a relative path counts from `folder`, by default the
    folder in which the command was typed. The server runs in another one.
    """
    made: list[str] = []
    flag = ""
    for arg in args:
        head, equals, value = arg.partition("=")
        if _NUMBER.match(arg):
            made.append(arg)
        elif arg.startswith("-"):
            made.append(f"{head}={typed_value(head, value, folder)}" if equals else arg)
            # A value behind = is the only one.
            flag = "" if equals else head
        else:
            made.append(str(typed_value(flag, arg, folder)))
    return tuple(made)


def typed_value(name: str, value: object, folder: Path | None = None) -> object:
    """Return the value of a flag, or of a key in its JSON, with absolute paths."""
    key = key_of(name)
    if isinstance(value, dict):
        return {
            inner: typed_value(name if key in _MAPS else inner, part, folder)
            for inner, part in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(typed_value(name, part, folder) for part in value)
    if not isinstance(value, str):
        return value
    document = json_of(value)
    if document is not None:
        changed = typed_value(name, document, folder)
        return value if changed == document else json.dumps(changed)
    if key == "lora_modules" and "=" in value:
        adapter, _, path = value.partition("=")
        return f"{adapter}={typed_value('lora_path', path, folder)}"
    return str(typed(value, folder)) if _is_path(key, value, folder) else value


def is_flag(arg: str) -> bool:
    """Return whether an argument is a flag: -1 is a value."""
    return arg.startswith("-") and arg not in ("-", "--") and not _NUMBER.match(arg)


def leaves(args: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each text in the values of flags, those in their JSON included: flag, key and text."""
    flag = ""
    for arg in args:
        head, equals, value = arg.partition("=")
        is_flag = arg.startswith("-") and not _NUMBER.match(arg)
        if is_flag:
            flag = head
        if equals or not is_flag:
            yield from ((flag, *leaf) for leaf in _leaves(flag, value if is_flag else arg))


def _leaves(name: str, value: object) -> Iterator[tuple[str, str]]:
    key = key_of(name)
    if isinstance(value, dict):
        for inner, part in value.items():
            yield from _leaves(name if key in _MAPS else inner, part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(name, part)
    elif isinstance(value, str):
        document = json_of(value)
        if document is not None:
            yield from _leaves(name, document)
        elif key == "lora_modules" and "=" in value:
            yield "lora_path", value.partition("=")[2]
        else:
            yield key, value


@dataclass(frozen=True)
class Reference:
    """A model, a tokenizer or the like that a flag names besides the model: a folder, or a name on
    the hub. One file of the patterns in `needs` has to be there, without patterns a whole model.
    """

    flag: str
    name: str
    revision: str | None
    needs: tuple[str, ...] = ()


def references(args: Sequence[str], model: str) -> tuple[Reference, ...]:
    """Return what arguments name besides the model (vllm/config/model.py, speculative.py)."""
    found: list[Reference] = []
    revision, code = last(args, "--revision"), last(args, "--code-revision")
    of_tokenizer = last(args, "--tokenizer-revision")
    if name := last(args, "--tokenizer"):
        found.append(Reference("--tokenizer", name, of_tokenizer, TOKENIZERS))
    elif of_tokenizer:
        found.append(Reference("--tokenizer-revision", model, of_tokenizer, TOKENIZERS))
    if code:
        found.append(Reference("--code-revision", model, code, ("*.py",)))
    if name := last(args, "--hf-config-path"):
        found.append(Reference("--hf-config-path", name, revision, CONFIGURATIONS))
    if (name := last(args, "--generation-config")) and name not in ("auto", "vllm"):
        found.append(Reference("--generation-config", name, revision, (GENERATION,)))
    for flag, key, text in leaves(args):
        is_adapter = flag == "--lora-modules" and key in ("lora_path", "path")
        if is_adapter or key == "default_mm_loras":
            found.append(Reference(flag, text, None, (ADAPTER,)))
    drafter = {key: text for flag, key, text in leaves(args) if flag.split(".")[0] in _DRAFTER}
    # Other names are methods, such as ngram, and classes.
    if "/" in (name := drafter.get("model", "")):
        found.append(Reference("--speculative-config", name, drafter.get("revision")))
    return tuple(found)


def key_of(name: str) -> str:
    """Return the name of a setting from its flag or its key: --a-b.some-dir is some_dir."""
    return name.rpartition(".")[2].lstrip("-").replace("-", "_")


def json_of(text: str) -> object | None:
    """Return the object or list of a JSON text, None for any other text."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return records.parse(text)
    except records.DecodeError:
        return None


def _is_path(key: str, text: str, folder: Path | None) -> bool:
    if not text or "://" in text or "\n" in text or key in _TEXTS:
        return False
    if is_relative(text):
        return True
    if _NAMES.fullmatch(key):
        return os.path.exists(typed(text, folder))
    return bool(_PATHS.fullmatch(key))


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
    shorts = {literal for literal in literals if _SHORT.fullmatch(literal)}
    reading.shorts |= shorts
    reading.longs |= dict.fromkeys(shorts, next(iter(sorted(names)), "")) if names else {}
    action = next(
        (ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "action"), ""
    )
    if "store_true" in action or "store_false" in action:
        reading.switches |= names
    elif "BooleanOptionalAction" in action:
        reading.switches |= names
        reading.negatable |= names


def drain_s(args: Sequence[str]) -> float:
    """Return the seconds in which vLLM may end its requests after SIGTERM."""
    text = last(args, "--shutdown-timeout") or ""
    return float(text) if text.isdigit() else 0.0
