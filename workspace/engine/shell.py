"""`inv run`, `inv shell`, `inv env.export`: the environment of a running vLLM for whatever the user starts."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence

from workspace.core import process
from workspace.core.console import Console
from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.layout import Layout
from workspace.core.settings import Settings, is_secret
from workspace.engine import surroundings
from workspace.environment import check

USUAL_SHELL = "/bin/sh"
# Lists of folders: what is ours goes before what the shell that reads the lines has by then.
_LISTS = ("PATH", "LD_LIBRARY_PATH")
# bash refuses to set these, and with them the whole of what it was to evaluate.
_READ_ONLY = ("UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS")
_NOT_BUILT = "./scripts/inv bootstrap"


def run(layout: Layout, settings: Settings, words: Sequence[str], *, console: Console) -> None:
    """Become the command: its terminal, signals and exit code are the caller's own. Raises ToolchainError where it is not there."""
    if not words:
        raise SettingsError("there is no command to run", hint="inv run -- python -c 'import vllm'    the command stands after --")
    process.become(words, env=_ready(layout, settings, console))


def shell(layout: Layout, settings: Settings, *, console: Console) -> None:
    """Become the user's shell."""
    program = settings.shell.get("SHELL") or USUAL_SHELL
    environment = _ready(layout, settings, console)
    console.say(f"{program} in the built environment; `exit` leaves it. What its own start-up files say goes before what it is given.")
    process.become([program], env=environment)


def export(layout: Layout, settings: Settings, *, console: Console) -> None:
    """Print lines for `eval "$(inv env.export)"` in sh: what a running vLLM is given and this shell has not, and scripts/ on PATH. No secret is printed."""
    check.require(layout, settings, console=console)
    environment = surroundings.variables(layout, settings, for_what="show")
    for line in lines(layout, environment, settings.shell):
        console.data(line)
    secrets = [name for name, text in environment.items() if is_secret(name) and settings.shell.get(name) != text]
    if secrets:
        console.say(f"left out, because they are secret: {', '.join(sorted(secrets))}; inv run and inv shell give them to what they start")


def lines(layout: Layout, environment: Mapping[str, str], outer: Mapping[str, str]) -> Iterator[str]:
    """Say in sh how `outer` becomes `environment`. Names that no shell can export are left out, and so are secrets and the built interpreter's folder."""
    for name, text in sorted(environment.items()):
        if name not in (*_LISTS, *_READ_ONLY, "VIRTUAL_ENV") and outer.get(name) != text and not is_secret(name) and name.isidentifier() and name.isascii():
            yield f"export {name}={shlex.quote(text)}"
    ours = {"PATH": [str(layout.root / "scripts")], "LD_LIBRARY_PATH": []}
    for name in _LISTS:
        there = outer.get(name, "").split(os.pathsep)
        added = [entry for entry in environment.get(name, "").split(os.pathsep) if entry and entry != str(layout.environment / "bin")]
        front = [entry for entry in (*ours[name], *added) if entry not in there]
        if front:
            yield f'export {name}={shlex.quote(os.pathsep.join(front))}"${{{name}:+:${name}}}"'


def _ready(layout: Layout, settings: Settings, console: Console) -> dict[str, str]:
    if not os.access(layout.environment_python, os.X_OK):
        raise ToolchainError("there is no built environment: .vllm/bin/python is missing", hint=_NOT_BUILT)
    check.require(layout, settings, console=console)
    return surroundings.variables(layout, settings)
