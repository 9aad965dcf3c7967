"""`inv run`, `inv shell` and `inv env.export`: the environment of a running vLLM, for a command,
for a shell, and as lines that a shell evaluates.
"""

import os
from collections.abc import Sequence

from workspace.core import hints, process
from workspace.core.console import Console
from workspace.core.errors import SettingsError, ToolchainError, printable
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import check
from workspace.machine.machine import Machine
from workspace.server.command import built_environment, lines, secret_names

USUAL_SHELL = "/bin/sh"


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
        name for name in secret_names(environment) if settings.shell.get(name) != environment[name]
    ]
    if secrets:
        console.info(
            f"left out, because they are secret: {', '.join(secrets)}; inv run and inv"
            " shell set them for their programs"
        )


def _ready(layout: Layout, settings: Settings, console: Console) -> dict[str, str]:
    if not os.access(layout.environment_python, os.X_OK):
        raise ToolchainError(
            "there is no built environment: .vllm/bin/python is missing",
            hint=hints.text("inv.bootstrap"),
        )
    machine = Machine(layout, settings)
    check.require(machine, console=console)
    return built_environment(machine, "shell")
