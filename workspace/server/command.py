"""Command line and environment of a vLLM that is started: a recipe's flags, the user's flags over
them, each known to the pinned tree.

Only values whose error would show after a long load, and values that open the machine to others,
are checked here; vLLM's parser checks the rest.
"""

import ipaddress
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core import hints, process
from workspace.core.child_variables import Phase
from workspace.core.console import Console
from workspace.core.errors import SettingsError, ToolchainError, WorkspaceError
from workspace.core.known_settings import KNOWN
from workspace.core.paths import Layout
from workspace.core.settings import Settings, is_secret
from workspace.machine import check, jit_caches, run_environment
from workspace.machine.machine import Machine
from workspace.repo.git import Git
from workspace.server import flags
from workspace.server.observation import Address
from workspace.server.recipes import Recipe

USUAL_SHELL = "/bin/sh"
UNKNOWN_TREE = "none"
# Lists of folders: our folders go before those of the shell that evaluates the lines.
_LISTS = ("PATH", "LD_LIBRARY_PATH")
# bash refuses to set these, and then evaluates no other line either.
_READ_ONLY = ("UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS")
LOCAL, USUAL_PORT = "127.0.0.1", 8000
# Flags that inv serve refuses, each with the name of its hint.
REFUSED = {
    "--api-key": "server.key_in_dotenv",
    "--hf-token": "server.token_in_dotenv",
    "--config": "server.flags_of_config",
    "--model": "server.model_first",
    "--model-tag": "server.model_first",
    "--uds": "server.needs_port",
    "--headless": "server.run_headless",
    "--help": "server.vllm_help",
    "-h": "server.vllm_help",
}
_COUNTS = (
    "--max-num-seqs",
    "--tensor-parallel-size",
    "--max-num-batched-tokens",
    "--pipeline-parallel-size",
)
_LENGTH = re.compile(r"[1-9]\d*|\d+(\.\d+)?[kKmMgG]|auto|-1")


def run_command(
    layout: Layout, settings: Settings, argv: Sequence[str], *, console: Console
) -> None:
    """Replace this process with the command, in the built environment.

    Raises ToolchainError if the program does not exist.
    """
    if not argv:
        raise SettingsError(
            "there is no command to run",
            hint=hints.text("server.run_command"),
        )
    process.become(argv, env=_ready(layout, settings, console))


def open_shell(layout: Layout, settings: Settings, *, console: Console) -> None:
    """Replace this process with the user's shell, in the built environment."""
    program = settings.shell.get("SHELL") or USUAL_SHELL
    environment = _ready(layout, settings, console)
    console.info(
        f"{program} in the built environment; `exit` leaves it. The shell's own start-up files may"
        " change the environment."
    )
    process.become([program], env=environment)


def export_variables(layout: Layout, settings: Settings, *, console: Console) -> None:
    """Print lines for `eval "$(inv env.export)"` in sh: variables of a running vLLM that this shell
    lacks, and scripts/ on PATH. Secrets are left out.
    """
    machine = Machine(layout, settings)
    check.require(machine, console=console)
    environment = built_environment(machine, "shell", is_shown=True)
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
            " shell set them for their programs"
        )


def lines(
    layout: Layout, environment: Mapping[str, str], outer: Mapping[str, str]
) -> Iterator[str]:
    """Yield lines of sh that turn `outer` into `environment`. Secrets, names that no shell can
    export and the built interpreter's folder are left out.
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
        present = outer.get(name, "").split(os.pathsep)
        added = [
            entry
            for entry in environment.get(name, "").split(os.pathsep)
            if entry and entry != str(layout.environment / "bin")
        ]
        front = [entry for entry in (*ours[name], *added) if entry not in present]
        if front:
            yield f'export {name}={shlex.quote(os.pathsep.join(front))}"${{{name}:+:${name}}}"'


def _ready(layout: Layout, settings: Settings, console: Console) -> dict[str, str]:
    if not os.access(layout.environment_python, os.X_OK):
        raise ToolchainError(
            "there is no built environment: .vllm/bin/python is missing",
            hint=hints.text("inv.bootstrap"),
        )
    machine = Machine(layout, settings)
    check.require(machine, console=console)
    return built_environment(machine, "shell")


@dataclass(frozen=True)
class Command:
    """Command line of a server. `args` are all flags, `extra` those that the user typed; `dropped`
    and `notes` are sentences for the screen.
    """

    args: tuple[str, ...]
    extra: tuple[str, ...]
    address: Address
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def argv(self, layout: Layout, model: str) -> tuple[str, ...]:
        """Return the whole command line, the program first."""
        return (str(layout.environment / "bin" / "vllm"), "serve", model, *self.args)


def compose(
    recipe: Recipe, extra: Sequence[str], known: flags.Flags, *, has_key: bool, force: bool
) -> Command:
    """Compose the command line. `force` allows a server that others can reach without a key.

    Raises SettingsError for a flag that is unknown or refused here, a value that is not valid, and
    a server open to others without a key.
    """
    users = flags.judge(extra, known)
    own = [flags.judge(args, known) for args in _by_flag(recipe, users.args)]
    args = [arg for judged in own for arg in judged.args] + list(users.args)
    for arg in users.args:
        if refused := REFUSED.get(arg.split("=")[0]):
            raise SettingsError(
                f"{arg.split('=')[0]} cannot be given to inv serve", hint=hints.text(refused)
            )
    if recipe.origin == "built-in" and not _has(args, "--served-model-name"):
        args += ["--served-model-name", recipe.model]
    if not _has(args, "--host"):
        args += ["--host", LOCAL]
    if not _has(args, "--port"):
        args += ["--port", str(USUAL_PORT)]
    _check_values(args)
    address = Address(
        flags.last(args, "--host") or "",
        int(flags.last(args, "--port") or USUAL_PORT),
        _has(args, "--ssl-certfile"),
    )
    notes = []
    if not is_local(address.host):
        notes.append(_exposed(address, has_key=has_key, force=force))
    if _has(args, "--trust-remote-code"):
        is_users = _has(users.args, "--trust-remote-code")
        source = "you ask for it" if is_users else "the recipe asks for it"
        notes.append(
            f"--trust-remote-code: {source}; code of the model's authors runs on this machine with"
            " your rights"
        )
    dropped = tuple(sentence for judged in (*own, users) for sentence in judged.dropped)
    return Command(tuple(args), users.args, address, dropped, tuple(notes))


def replaced(extra: Sequence[str], flag: str, value: str) -> tuple[str, ...]:
    """Return the user's flags with another value for one flag that takes one value."""
    remaining, kept = list(extra), []
    while remaining:
        arg = remaining.pop(0)
        if arg == flag:
            del remaining[:1]
        elif not arg.startswith(f"{flag}="):
            kept.append(arg)
    return (*kept, flag, value)


def is_local(host: str) -> bool:
    """Return whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def typed(name: str, extra: Sequence[str], *, detach: bool = False) -> str:
    """Return the `inv serve` command of a user, ready to be copied."""
    parts = [
        "./scripts/inv",
        "serve",
        shlex.quote(name),
        *(["--detach"] if detach else []),
        *(["--", shlex.join(extra)] if extra else []),
    ]
    return " ".join(parts)


def shown(
    layout: Layout, settings: Settings, argv: Sequence[str], environment: Mapping[str, str]
) -> Iterator[str]:
    """Yield lines of sh that start the command in its environment. Secrets have names only."""
    others = {*KNOWN, "_", "OLDPWD", "PWD", "SHLVL"}
    removed = [
        name
        for name in sorted(settings.shell)
        if name not in environment and name not in others and name.isidentifier()
    ]
    if removed:
        yield f"unset {' '.join(removed)}"
    yield from lines(layout, environment, settings.shell)
    for name, text in sorted(environment.items()):
        if is_secret(name):
            yield f"# {name} is {'set, and not shown' if text else 'empty'}"
    yield settings.masked(shlex.join(argv))


def folder_of(name: str) -> Path | None:
    """Return the folder that a path on the command line means, None if it is no path."""
    path = Path(os.path.expanduser(name))
    return (
        path.absolute()
        if name.startswith(("/", "./", "../", "~"))
        or name in (".", "..")
        or ("/" in name and path.is_dir())
        else None
    )


def _by_flag(recipe: Recipe, users: Sequence[str]) -> Iterator[list[str]]:
    """Yield the arguments of each flag of the recipe that the user does not set."""
    for name, value in recipe.flags.items():
        flag = f"--{name}"
        if not _has(users, flag) and not _has(users, f"--no-{name}"):
            yield flags.args_of(name, list(value) if isinstance(value, tuple) else value)


def _has(args: Sequence[str], flag: str) -> bool:
    return any(arg == flag or arg.startswith(f"{flag}=") for arg in args)


def _check_values(args: Sequence[str]) -> None:
    port = flags.last(args, "--port") or ""
    if not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise SettingsError(
            f"--port: {port!r} is no port from 1 to 65535", hint=hints.text("server.port")
        )
    if not flags.last(args, "--host"):
        raise SettingsError(
            "--host: the address is missing", hint=hints.text("server.host", host=LOCAL)
        )
    share = flags.last(args, "--gpu-memory-utilization")
    if share is not None and not (
        re.fullmatch(r"\d*\.?\d+|\d+\.", share) and 0 < float(share) <= 1
    ):
        raise SettingsError(
            f"--gpu-memory-utilization: {share!r} is no share above 0 and at most 1",
            hint=hints.text("server.utilization"),
        )
    for name in _COUNTS:
        count = flags.last(args, name)
        if count is not None and not re.fullmatch(r"[1-9]\d{0,8}|\d+(\.\d+)?[kKmM]", count):
            raise SettingsError(
                f"{name}: {count!r} is no whole number of at least 1",
                hint=hints.text("server.positive", flag=name),
            )
    length = flags.last(args, "--max-model-len")
    if length is not None and not _LENGTH.fullmatch(length):
        raise SettingsError(
            f"--max-model-len: {length!r} is no number of tokens",
            hint=hints.text("server.max_model_len"),
        )


def _exposed(address: Address, *, has_key: bool, force: bool) -> str:
    reach = (
        f"--host {address.host} lets everyone who reaches port {address.port} of this machine use"
        " the model"
    )
    if has_key:
        return (
            f"{reach}; paths below /v1 need VLLM_API_KEY, other paths such as /metrics need no key,"
            " and nothing is encrypted"
        )
    if not force:
        hint = hints.text("server.api_key", port=address.port, host=LOCAL)
        raise SettingsError(f"{reach} without a key", hint=hint)
    return f"{reach} without a key (--force)"


def built_environment(
    machine: Machine,
    phase: Phase,
    *,
    recipe: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
    is_shown: bool = False,
) -> dict[str, str]:
    """Return the environment of a vLLM that is to be started, or with `is_shown` only shown.

    For a start the folders of compiled kernels are recorded as this stack's. Runs git once, and
    asks the driver if torch is built for CUDA. See run_environment.built_environment. Raises
    SmokeError for a start in a copied or moved clone, whose .vllm has the vLLM of another one.
    """
    layout, settings = machine.layout, machine.settings
    if not is_shown:
        run_environment.require_own_tree(layout)
    stack = jit_caches.observe(machine, tree=tree_oid(layout))
    if not is_shown:
        jit_caches.record(layout, stack)
    return run_environment.built_environment(
        layout, settings, phase, stack=stack, recipe=recipe, given=given
    )


def tree_oid(layout: Layout) -> str:
    """Return the tree OID of HEAD in vendor/vllm. Uncommitted edits do not count: whatever compiles
    them reads their text.
    """
    if not (layout.vllm / ".git").exists():
        return UNKNOWN_TREE
    try:
        return Git(layout.vllm).tree("HEAD")
    except WorkspaceError:
        # smoke, status and doctor report a broken repository.
        return UNKNOWN_TREE
