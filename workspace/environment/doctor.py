"""What this machine lacks, each lack with the command that mends it: `inv doctor`, and the preflight of verbs that build or serve.

One table of checks; a preflight is a selection from it. Checks look and change nothing; they run beside each other.
"""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.core.console import NAME_WIDTH, STATE_WIDTH, Console
from workspace.core.errors import ToolchainError, WorkspaceError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import doctor_cache, doctor_cuda, doctor_machine, doctor_network, doctor_ptxas, doctor_shell, doctor_tools, machine
from workspace.environment.doctor_case import Case, Row, State
from workspace.environment.doctor_tools import demanded_compiler

__all__ = ["CHECKS", "Row", "State", "demanded_compiler", "device", "examine", "preflight", "show"]

# What a check is for: a bootstrap for a device, compiling kernels, serving. The doctor itself runs all, `network` unless told not to.
Purpose = Literal["cpu", "cuda", "native", "serve", "network"]
SCHEMA = 1
ORDER: tuple[State, ...] = ("ok", "warn", "FAIL")


@dataclass(frozen=True)
class Check:
    look: Callable[[Case], Iterator[Row]]
    purposes: frozenset[Purpose]


def _check(look: Callable[[Case], Iterator[Row]], *purposes: Purpose) -> Check:
    return Check(look, frozenset(purposes))


CHECKS: tuple[Check, ...] = (
    _check(doctor_machine.disk, "cpu", "cuda", "native"),
    _check(doctor_machine.folders, "cpu", "cuda", "native"),
    _check(doctor_machine.architecture),
    _check(doctor_machine.cores, "native", "serve"),
    _check(doctor_machine.memory, "native", "serve"),
    _check(doctor_machine.swap, "native", "serve"),
    _check(doctor_machine.brake, "native", "serve"),
    _check(doctor_tools.python, "cpu", "cuda", "native"),
    _check(doctor_tools.git, "cpu", "cuda", "native"),
    _check(doctor_tools.uv, "cpu", "cuda", "native"),
    _check(doctor_tools.headers, "cpu", "cuda", "native", "serve"),
    _check(doctor_tools.compiler, "cuda", "native"),
    _check(doctor_tools.cmake, "native"),
    _check(doctor_tools.ninja, "native"),
    _check(doctor_tools.patch, "native"),
    _check(doctor_cache.ccache, "native"),
    _check(doctor_cuda.driver, "cuda", "serve"),
    _check(doctor_cuda.toolkit, "cuda", "native"),
    _check(doctor_cuda.agreement, "cuda", "native", "serve"),
    _check(doctor_cuda.archs, "native"),
    _check(doctor_ptxas.ptxas, "serve"),
    _check(doctor_shell.library_path, "native", "serve"),
    _check(doctor_cuda.residents, "native", "serve"),
    _check(doctor_shell.token),
    _check(doctor_shell.settings),
    _check(doctor_network.vllm, "network"),
    _check(doctor_network.triton, "network"),
    _check(doctor_network.index, "network"),
    _check(doctor_network.torch_index, "network"),
)


def device(settings: Settings, host: machine.Machine) -> Literal["cuda", "cpu"]:
    """Decide DEVICE=auto: cuda where the driver shows a GPU."""
    asked = settings.text("DEVICE")
    if asked == "auto":
        return "cuda" if host.gpus else "cpu"
    return "cuda" if asked == "cuda" else "cpu"


def preflight(layout: Layout, settings: Settings, *, device: str, kernels: str, need_gib: Mapping[Path, float], for_serving: bool = False) -> tuple[Row, ...]:
    """Check what a verb needs, disk first. `kernels` is donor, native, or anything else for a wheel; `need_gib` maps folders to GiB.

    For a bootstrap or, with `for_serving`, for running what was built.
    """
    wanted: set[Purpose] = {"serve"} if for_serving else {"cuda" if device == "cuda" else "cpu"}
    if kernels == "native" and not for_serving:
        wanted.add("native")
    case = Case(layout, settings, device=device, kernels=kernels, places=doctor_machine.preflight_places(need_gib))
    return examine(case, [check for check in CHECKS if check.purposes & wanted])


def examine(case: Case, checks: Sequence[Check]) -> tuple[Row, ...]:
    """Run checks beside each other and return their rows in the checks' order."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=max(1, len(checks))) as pool:
        return tuple(row for rows in pool.map(lambda check: _rows(check, case), checks) for row in rows)


def _rows(check: Check, case: Case) -> tuple[Row, ...]:
    """A machine in trouble must not end the look at the rest of it: files that cannot be read, answers of no known form."""
    name = check.look.__name__.replace("_", " ")
    try:
        return tuple(check.look(case))
    except WorkspaceError as exc:
        return (Row("warn", name, exc.message, "it could not be looked at", exc.hint),)
    except (OSError, ValueError) as exc:
        return (Row("warn", name, f"could not be looked at: {exc}", "what the machine says there has no known form, or cannot be read"),)


def show(layout: Layout, settings: Settings, *, console: Console, as_json: bool = False, offline: bool = False) -> None:
    """Print every row, or one JSON document. Raises ToolchainError where a row is FAIL."""
    case = Case(layout, settings, device=None, kernels=settings.text("KERNELS"))
    rows = examine(case, [check for check in CHECKS if not (offline and "network" in check.purposes)])
    verdict = max((row.state for row in rows), key=ORDER.index, default="ok")
    if as_json:
        console.data(json.dumps({"schema": SCHEMA, "rows": [asdict(row) for row in rows], "verdict": verdict}, indent=1))
    else:
        _print(rows, console)
    bad = [row for row in rows if row.state == "FAIL"]
    if bad:
        raise ToolchainError(f"this machine lacks something: {', '.join(dict.fromkeys(row.name for row in bad))}", hint=bad[0].cure)


def _print(rows: tuple[Row, ...], console: Console) -> None:
    """What is well on one line each; of the rest what was seen, why it matters and the command, each on its own line."""
    room = (_width() if console.is_terminal else sys.maxsize) - STATE_WIDTH - NAME_WIDTH
    indent = " " * (STATE_WIDTH + NAME_WIDTH)
    for row in rows:
        first, *more = _wrapped(row.seen, room)
        console.row(row.state, row.name, first)
        if row.state != "ok":
            more += _wrapped(row.why, room)
        for line in more:
            console.say(indent + line)
        if row.cure and row.state != "ok":
            # Never wrapped, so that it can be copied.
            console.say(f"{indent}$ {row.cure}", style="bold")
    counts = {state: sum(row.state == state for row in rows) for state in ORDER}
    console.say(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['FAIL']} in the way")


def _wrapped(text: str, room: int) -> list[str]:
    return textwrap.wrap(text, max(20, room), break_long_words=False, break_on_hyphens=False) or [""]


def _width() -> int:
    """Columns of the terminal that the rows are printed on, which is stderr's."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size((100, 24)).columns
