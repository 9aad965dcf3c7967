"""`inv run`, `inv shell` and `inv env.export`: the environment of a running vLLM, for a command, for
a shell, and as lines that a shell evaluates.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence

from workspace.core import hints, process
from workspace.core.console import Console
from workspace.core.errors import SettingsError, ToolchainError, printable
from workspace.core.known_settings import has_login, is_secret, secrets_of
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import check
from workspace.machine.machine import Machine
from workspace.server.command import built_environment

USUAL_SHELL = "/bin/sh"
# Lists of folders: our folders go before those of the shell that evaluates the lines.
_LISTS = ("PATH", "LD_LIBRARY_PATH")
# bash refuses to set these, and then evaluates no other line either.
_READ_ONLY = ("UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS")
_LONG_SECRET = 8


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
        # A control character is shown escaped, which would be another value.
        if printable(line) == line:
            console.data(line)
    secrets = [
        name for name in _secret_names(environment) if settings.shell.get(name) != environment[name]
    ]
    if secrets:
        console.info(
            f"left out, because they are secret: {', '.join(secrets)}; inv run and inv"
            " shell set them for their programs"
        )


def _secret_names(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that hold a secret: by name, with a password, or with another's value.

    A short value, such as a password of four letters, is a part of many that are not secret.
    """
    secrets = [text for text in secrets_of(environment.items()) if len(text) >= _LONG_SECRET]
    return sorted(
        name
        for name, text in environment.items()
        if is_secret(name) or has_login(text) or any(secret in text for secret in secrets)
    )


def lines(
    layout: Layout, environment: Mapping[str, str], outer: Mapping[str, str]
) -> Iterator[str]:
    """Yield lines of sh that turn `outer` into `environment`. Secrets, names that no shell can
    export and the built interpreter's folder are left out.
    """
    secret = _secret_names(environment)
    for name, text in sorted(environment.items()):
        if (
            name not in (*_LISTS, *_READ_ONLY, "VIRTUAL_ENV")
            and outer.get(name) != text
            and name not in secret
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
