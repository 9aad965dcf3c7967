"""What is typed becomes the one command line that vLLM is started with: a recipe's flags, the
user's over them, each known to the pinned tree.

Only values that would cost a long load before anybody says so are judged here, and what would open
the machine to others; the rest is the parser's.
"""

import ipaddress
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import process
from workspace.core.console import Console
from workspace.core.errors import SettingsError, ToolchainError, WorkspaceError
from workspace.core.paths import Layout
from workspace.core.settings import KNOWN, Settings, is_secret
from workspace.machine import check, jit_caches, run_environment
from workspace.repo.git import Git
from workspace.server import flags
from workspace.server.observation import Address
from workspace.server.recipes import Recipe

USUAL_SHELL = "/bin/sh"
UNKNOWN_TREE = "none"
# Lists of folders: what is ours goes before what the shell that reads the lines has by then.
_LISTS = ("PATH", "LD_LIBRARY_PATH")
# bash refuses to set these, and with them the whole of what it was to evaluate.
_READ_ONLY = ("UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS")
_NOT_BUILT = "./scripts/inv bootstrap"


def run_command(
    layout: Layout, settings: Settings, words: Sequence[str], *, console: Console
) -> None:
    """Become the command: its terminal, signals and exit code are the caller's own. Raises
    ToolchainError where it is not there.
    """
    if not words:
        raise SettingsError(
            "there is no command to run",
            hint="inv run -- python -c 'import vllm'    the command stands after --",
        )
    process.become(words, env=_ready(layout, settings, console))


def open_shell(layout: Layout, settings: Settings, *, console: Console) -> None:
    """Become the user's shell."""
    program = settings.shell.get("SHELL") or USUAL_SHELL
    environment = _ready(layout, settings, console)
    console.info(
        f"{program} in the built environment; `exit` leaves it. What its own start-up files say"
        " goes before what it is given."
    )
    process.become([program], env=environment)


def export_variables(layout: Layout, settings: Settings, *, console: Console) -> None:
    """Print lines for `eval "$(inv env.export)"` in sh: what a running vLLM is given and this shell
    has not, and scripts/ on PATH. No secret is printed.
    """
    check.require(layout, settings, console=console)
    environment = built_environment(layout, settings, for_what="show")
    for line in lines(layout, environment, settings.shell):
        console.data(line)
    secrets = [
        name
        for name, text in environment.items()
        if is_secret(name) and settings.shell.get(name) != text
    ]
    if secrets:
        console.info(
            f"left out, because they are secret: {', '.join(sorted(secrets))}; inv run and inv"
            " shell give them to what they start"
        )


def lines(
    layout: Layout, environment: Mapping[str, str], outer: Mapping[str, str]
) -> Iterator[str]:
    """Say in sh how `outer` becomes `environment`. Names that no shell can export are left out, and
    so are secrets and the built interpreter's folder.
    """
    for name, text in sorted(environment.items()):
        if (
            name not in (*_LISTS, *_READ_ONLY, "VIRTUAL_ENV")
            and outer.get(name) != text
            and not is_secret(name)
            and name.isidentifier()
            and name.isascii()
        ):
            yield f"export {name}={shlex.quote(text)}"
    ours = {"PATH": [str(layout.root / "scripts")], "LD_LIBRARY_PATH": []}
    for name in _LISTS:
        there = outer.get(name, "").split(os.pathsep)
        added = [
            entry
            for entry in environment.get(name, "").split(os.pathsep)
            if entry and entry != str(layout.environment / "bin")
        ]
        front = [entry for entry in (*ours[name], *added) if entry not in there]
        if front:
            yield f'export {name}={shlex.quote(os.pathsep.join(front))}"${{{name}:+:${name}}}"'


def _ready(layout: Layout, settings: Settings, console: Console) -> dict[str, str]:
    if not os.access(layout.environment_python, os.X_OK):
        raise ToolchainError(
            "there is no built environment: .vllm/bin/python is missing", hint=_NOT_BUILT
        )
    check.require(layout, settings, console=console)
    return built_environment(layout, settings)


LOCAL, USUAL_PORT = "127.0.0.1", 8000
# What no word of a command line may say here, and where it belongs.
_ELSEWHERE = {
    "--api-key": "everybody sees it in ps: put VLLM_API_KEY into .env",
    "--hf-token": "everybody sees it in ps: put HF_TOKEN into .env",
    "--config": "what stands in that file would be judged by nobody: write its flags after --",
    "--model": "the model is the word after inv serve",
    "--model-tag": "the model is the word after inv serve",
    "--uds": "whether the server is ready is asked over a port",
    "--headless": (
        "there would be nobody to ask whether it is ready: ./scripts/inv run -- vllm serve ..."
    ),
    "--help": "./scripts/inv run -- vllm serve --help=all",
    "-h": "./scripts/inv run -- vllm serve --help=all",
}
_COUNTS = (
    "--max-num-seqs",
    "--tensor-parallel-size",
    "--max-num-batched-tokens",
    "--pipeline-parallel-size",
)
_LENGTH = re.compile(r"[1-9]\d*|\d+(\.\d+)?[kKmMgG]|auto|-1")


@dataclass(frozen=True)
class Command:
    """`words` are all flags, `extra` those that the user typed; `dropped` and `said` are sentences
    for the screen.
    """

    words: tuple[str, ...]
    extra: tuple[str, ...]
    address: Address
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def argv(self, layout: Layout, model: str) -> tuple[str, ...]:
        return (str(layout.environment / "bin" / "vllm"), "serve", model, *self.words)


def compose(
    recipe: Recipe, extra: Sequence[str], known: flags.Flags, *, has_key: bool, force: bool
) -> Command:
    """Put the command line together. `knows`: the user has said that they know who can reach the
    server.

    Raises SettingsError for a flag that is unknown, one that does not belong there, a value that
    cannot be, and a server open to others without a key.
    """
    users = flags.judge(extra, known)
    own = [flags.judge(words, known) for words in _by_flag(recipe, users.words)]
    words = [word for judged in own for word in judged.words] + list(users.words)
    for word in users.words:
        if reason := _ELSEWHERE.get(word.split("=")[0]):
            raise SettingsError(f"{word.split('=')[0]} cannot be given to inv serve", hint=reason)
    if recipe.origin == "built-in" and not _has(words, "--served-model-name"):
        words += ["--served-model-name", recipe.model]
    if not _has(words, "--host"):
        words += ["--host", LOCAL]
    if not _has(words, "--port"):
        words += ["--port", str(USUAL_PORT)]
    _judge_values(words)
    address = Address(
        flags.last(words, "--host") or "",
        int(flags.last(words, "--port") or USUAL_PORT),
        _has(words, "--ssl-certfile"),
    )
    said = []
    if not is_local(address.host):
        said.append(_exposed(address, has_key=has_key, force=force))
    if _has(words, "--trust-remote-code"):
        who = (
            "the recipe asks for it"
            if not _has(users.words, "--trust-remote-code")
            else "you ask for it"
        )
        said.append(
            f"--trust-remote-code: {who}; code of the model's authors runs on this machine, as you"
        )
    return Command(
        tuple(words),
        users.words,
        address,
        tuple(one for judged in (*own, users) for one in judged.dropped),
        tuple(said),
    )


def replaced(extra: Sequence[str], flag: str, value: str) -> tuple[str, ...]:
    """The user's words with one flag of one value said otherwise."""
    left, kept = list(extra), []
    while left:
        word = left.pop(0)
        if word == flag:
            del left[:1]
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return (*kept, flag, value)


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def typed(name: str, extra: Sequence[str], *, detach: bool = False) -> str:
    """What a user types for it, ready to be copied."""
    words = [
        "./scripts/inv",
        "serve",
        shlex.quote(name),
        *(["--detach"] if detach else []),
        *(["--", shlex.join(extra)] if extra else []),
    ]
    return " ".join(words)


def shown(
    layout: Layout, settings: Settings, argv: Sequence[str], environment: Mapping[str, str]
) -> Iterator[str]:
    """Say in sh what is started, in which environment. Secrets go by their names only."""
    others = {*KNOWN, "_", "OLDPWD", "PWD", "SHLVL"}
    gone = [
        name
        for name in sorted(settings.shell)
        if name not in environment and name not in others and name.isidentifier()
    ]
    if gone:
        yield f"unset {' '.join(gone)}"
    yield from lines(layout, environment, settings.shell)
    for name, text in sorted(environment.items()):
        if is_secret(name):
            yield f"# {name} is {'set, and stays unsaid' if text else 'empty'}"
    yield settings.masked(shlex.join(argv))


def folder_of(name: str) -> Path | None:
    """The folder that somebody means by a path, None where it is no path."""
    path = Path(os.path.expanduser(name))
    return (
        path.absolute()
        if name.startswith(("/", "./", "../", "~"))
        or name in (".", "..")
        or ("/" in name and path.is_dir())
        else None
    )


def _by_flag(recipe: Recipe, users: Sequence[str]) -> Iterator[list[str]]:
    """The recipe's words, a flag at a time, without those that the user says otherwise."""
    for name, value in recipe.flags.items():
        flag = f"--{name}"
        if not _has(users, flag) and not _has(users, f"--no-{name}"):
            yield flags.args_of(name, list(value) if isinstance(value, tuple) else value)


def _has(words: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in words)


def _judge_values(words: Sequence[str]) -> None:
    port = flags.last(words, "--port") or ""
    if not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise SettingsError(f"--port: {port!r} is no port from 1 to 65535", hint="-- --port 8000")
    if not flags.last(words, "--host"):
        raise SettingsError("--host: there is no address", hint=f"-- --host {LOCAL}")
    share = flags.last(words, "--gpu-memory-utilization")
    if share is not None and not (
        re.fullmatch(r"\d*\.?\d+|\d+\.", share) and 0 < float(share) <= 1
    ):
        raise SettingsError(
            f"--gpu-memory-utilization: {share!r} is no share above 0 and at most 1",
            hint="-- --gpu-memory-utilization 0.7",
        )
    for name in _COUNTS:
        count = flags.last(words, name)
        if count is not None and not re.fullmatch(r"[1-9]\d{0,8}|\d+(\.\d+)?[kKmM]", count):
            raise SettingsError(
                f"{name}: {count!r} is no whole number of at least 1", hint=f"-- {name} 8"
            )
    length = flags.last(words, "--max-model-len")
    if length is not None and not _LENGTH.fullmatch(length):
        raise SettingsError(
            f"--max-model-len: {length!r} is no number of tokens",
            hint="-- --max-model-len 32000, or 32k, or auto",
        )


def _exposed(address: Address, *, has_key: bool, force: bool) -> str:
    reach = (
        f"--host {address.host} lets whoever reaches this machine's port {address.port} use the"
        " model"
    )
    if has_key:
        return (
            f"{reach}; below /v1 it asks for VLLM_API_KEY, elsewhere, such as /metrics, for"
            " nothing, and nothing is encrypted"
        )
    if not force:
        hint = (
            "put VLLM_API_KEY into .env; or from elsewhere: ssh -L"
            f" {address.port}:{LOCAL}:{address.port} THIS-MACHINE; or say --force"
        )
        raise SettingsError(f"{reach}, and no key is asked for", hint=hint)
    return f"{reach}, and no key is asked for (--force)"


def built_environment(
    layout: Layout,
    settings: Settings,
    *,
    recipe: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
    for_what: Literal["start", "show"] = "start",
) -> dict[str, str]:
    """Return every variable of a vLLM that is about to be started, or shown; starting, the folders
    of compiled kernels are marked as this stack's.

    `recipe` is a recipe's environment, `more` what the caller insists on. Costs a git start, and a
    question to the driver where torch is built for CUDA.
    """
    stack = jit_caches.observe(layout, settings, tree=tree_oid(layout))
    if for_what == "start":
        jit_caches.record(layout, stack)
    return run_environment.run_variables(layout, settings, stack=stack, recipe=recipe, more=more)


def tree_oid(layout: Layout) -> str:
    """The tree OID that vendor/vllm stands on; edits on top do not count, since what compiles them
    looks at their text itself.
    """
    if not (layout.vllm / ".git").exists():
        return UNKNOWN_TREE
    try:
        return Git(layout.vllm).tree("HEAD")
    except WorkspaceError:
        # A repository that is broken is what smoke, status and doctor complain of.
        return UNKNOWN_TREE
