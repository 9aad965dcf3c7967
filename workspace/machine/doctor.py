"""What this machine lacks, each lack with the command that mends it: `inv doctor`, and the
preflight of verbs that build or serve.

One table of checks; a preflight is a selection from it. Checks look and change nothing; they run
beside each other.
"""

import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.core.console import NAME_WIDTH, STATE_WIDTH, Console
from workspace.core.errors import ToolchainError, WorkspaceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import doctor_host, doctor_toolchain, dotenv, hardware, toolchain
from workspace.machine.case import Case, Row, State, without_user
from workspace.machine.doctor_toolchain import demanded_compiler

# Room for the objects of two builds, compressed: an estimate, no measurement.
CACHE_GIB = {"cpu": 1.0, "cuda": 10.0}
_UNITS = {
    "": 1e9,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "t": 1e12,
    "ki": 1024.0,
    "mi": 1024.0**2,
    "gi": 1024.0**3,
    "ti": 1024.0**4,
}
_SCCACHE_REMOTES = re.compile(
    r"SCCACHE_(BUCKET|REDIS\w*|MEMCACHED\w*|GCS_BUCKET|AZURE_CONNECTION_STRING|GHA_ENABLED|WEBDAV_ENDPOINT|OSS_BUCKET)$"
)
_CONFIG_LINE = re.compile(r"^\((?P<origin>[^)]*)\) (?P<key>\w+) = ?(?P<value>.*)$", re.MULTILINE)


def ccache(case: Case) -> Iterator[Row]:
    """Check the compiler cache that a build takes, as a build sets it: its size, its limit, and
    whether it can hit.
    """
    cache = toolchain.find_cache(case.settings)
    if cache is None:
        state: State = "warn" if case.is_native else "ok"
        yield Row(
            state,
            "ccache",
            "none",
            "without it every build from an empty folder compiles everything again",
            "sudo apt install ccache",
        )
    else:
        yield (
            _sccache(case, str(cache.program))
            if cache.kind == "sccache"
            else _ccache(case, str(cache.program))
        )


def _ccache(case: Case, program: str) -> Row:
    listed = case.ask(
        [program, "--show-config"], extra=toolchain.cache_configuration(case.layout, case.settings)
    )
    config = (
        {
            found["key"]: (found["value"].strip(), found["origin"])
            for found in _CONFIG_LINE.finditer(listed.stdout)
        }
        if listed
        else {}
    )
    why = "objects that were compiled before are taken from it"
    if not config or listed is None or listed.returncode != 0:
        return Row(
            "warn",
            "ccache",
            f"{program} does not say how it is set up",
            why,
            f"{program} --show-config",
        )
    done = case.ask([program, "--print-stats"])
    stats = dict(re.findall(r"^(\w+)\t(\d+)$", done.stdout if done else "", re.MULTILINE))
    value = {name: text for name, (text, _) in config.items()}
    limit_gib = size_gib(value.get("max_size", ""))
    used_gib = (
        int(stats["cache_size_kibibyte"]) / 1024**2 if "cache_size_kibibyte" in stats else None
    )
    words = [
        "size unknown" if used_gib is None else f"{used_gib:.1f} GiB" if used_gib else "empty",
        "no limit" if limit_gib == 0 else f"limit {value.get('max_size') or 'unknown'}",
        f"hash_dir {value.get('hash_dir', '?')}",
        f"base_dir {value.get('base_dir') or 'none'}",
        f"sloppiness {value.get('sloppiness') or 'none'}",
    ]
    if remote := value.get("remote_storage") or value.get("secondary_storage"):
        words.append(
            "remote " + " ".join(without_user(place.split("|")[0]) for place in remote.split())
        )
    seen = f"{case.layout.relative(Path(program))}: {', '.join(words)}"
    faults = tuple(_ccache_faults(case, config, limit_gib))
    if not faults:
        return Row("ok", "ccache", seen, why)
    return Row(
        "warn",
        "ccache",
        seen,
        "; ".join(harm for harm, _ in faults),
        " && ".join(hint for _, hint in faults),
    )


def _ccache_faults(
    case: Case, config: dict[str, tuple[str, str]], limit_gib: float | None
) -> Iterator[tuple[str, str]]:
    """Yield what keeps ccache from a hit, each with its cure."""
    for name, harm in (
        ("disable", "it is switched off"),
        ("read_only", "it never keeps what it compiles"),
        ("recache", "it never takes what it has"),
    ):
        text, origin = config.get(name, ("", ""))
        if toolchain.is_cache_on(text):
            variable = {"read_only": "CCACHE_READONLY"}.get(name, f"CCACHE_{name.upper()}")
            yield (
                f"{harm} ({name})",
                (
                    f"unset {variable}"
                    if origin == "environment"
                    else f"ccache --set-config {name}=false"
                ),
            )
    folder = Path(config["cache_dir"][0]) if config.get("cache_dir", ("",))[0] else None
    if folder and folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        yield (
            f"{folder} cannot be written, nothing is kept",
            f'sudo chown -R "$USER" {shlex.quote(str(folder))}',
        )
    need = CACHE_GIB[case.device]
    if limit_gib is not None and 0 < limit_gib < need * 0.9:
        yield (
            f"a build may need {need:.0f} GiB and would push its own objects out",
            f"ccache --set-config max_size={2 * need:.0f}G",
        )
    if toolchain.is_cache_on(config.get("hash_dir", ("", ""))[0]):
        yield (
            "with debug information an object counts for one clone only (hash_dir)",
            "unset CCACHE_HASHDIR",
        )
    base = config.get("base_dir", ("", ""))[0]
    if base and not case.layout.root.is_relative_to(base):
        yield (
            f"objects count for this clone only: it does not lie below {base} (base_dir)",
            "unset CCACHE_BASEDIR",
        )


def _sccache(case: Case, program: str) -> Row:
    """Its statistics are not asked for: that would start its server. vLLM's own setup.py would take
    it too.
    """
    environment = case.settings.child_environment("build")
    said = case.first_line([program, "--version"])
    why = (
        "objects that were compiled before are taken from it; with ccache instead, compilers step"
        " back and are measured"
    )
    if said is None:
        return Row(
            "warn",
            "ccache",
            f"{program} does not run, and vLLM would compile through it",
            why,
            "echo VLLM_DISABLE_SCCACHE=1 >> .env",
        )
    limit = environment.get("SCCACHE_CACHE_SIZE") or "10G"
    remotes = sorted(name for name in environment if _SCCACHE_REMOTES.match(name))
    seen = (
        f"{said}: limit {limit}, {environment.get('SCCACHE_DIR') or case.cache_home / 'sccache'}"
        + (f", remote by {', '.join(remotes)}" if remotes else "")
    )
    limit_gib, need = size_gib(limit), CACHE_GIB[case.device]
    if not remotes and limit_gib is not None and limit_gib < need * 0.9:
        return Row(
            "warn",
            "ccache",
            seen,
            f"a build may need {need:.0f} GiB and would push its own objects out",
            f"export SCCACHE_CACHE_SIZE={2 * need:.0f}G",
        )
    return Row("ok", "ccache", seen, why)


def size_gib(text: str) -> float | None:
    """Return a size as ccache(1) and sccache write it, such as 5.0G or 500 MiB, in GiB; None where
    it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    return float(found[1]) * _UNITS[found[2]] / 1024**3 if found and found[2] in _UNITS else None


__all__ = ["CHECKS", "Row", "State", "demanded_compiler", "device", "examine", "preflight", "show"]

# What a check is for: a bootstrap for a device, compiling kernels, serving. The doctor itself runs
# all, `network` unless told not to.
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
    _check(doctor_host.disk, "cpu", "cuda", "native"),
    _check(doctor_host.folders, "cpu", "cuda", "native"),
    _check(doctor_host.architecture),
    _check(doctor_host.cores, "native", "serve"),
    _check(doctor_host.memory, "native", "serve"),
    _check(doctor_host.swap, "native", "serve"),
    _check(doctor_host.brake, "native", "serve"),
    _check(doctor_toolchain.python, "cpu", "cuda", "native"),
    _check(doctor_toolchain.git, "cpu", "cuda", "native"),
    _check(doctor_toolchain.uv, "cpu", "cuda", "native"),
    _check(doctor_toolchain.headers, "cpu", "cuda", "native", "serve"),
    _check(doctor_toolchain.compiler, "cuda", "native"),
    _check(doctor_toolchain.cmake, "native"),
    _check(doctor_toolchain.ninja, "native"),
    _check(doctor_toolchain.patch, "native"),
    _check(ccache, "native"),
    _check(doctor_toolchain.driver, "cuda", "serve"),
    _check(doctor_toolchain.toolkit, "cuda", "native"),
    _check(doctor_toolchain.agreement, "cuda", "native", "serve"),
    _check(doctor_toolchain.archs, "native"),
    _check(dotenv.ptxas, "serve"),
    _check(doctor_host.library_path, "native", "serve"),
    _check(doctor_toolchain.residents, "native", "serve"),
    _check(doctor_host.token),
    _check(doctor_host.settings),
    _check(doctor_host.vllm, "network"),
    _check(doctor_host.triton, "network"),
    _check(doctor_host.index, "network"),
    _check(doctor_host.torch_index, "network"),
)


def device(settings: Settings, host: hardware.Machine) -> Literal["cuda", "cpu"]:
    """Decide DEVICE=auto: cuda where the driver shows a GPU."""
    asked = settings.text("DEVICE")
    if asked == "auto":
        return "cuda" if host.gpus else "cpu"
    return "cuda" if asked == "cuda" else "cpu"


def preflight(
    layout: Layout,
    settings: Settings,
    *,
    device: str,
    kernels: str,
    need_gib: Mapping[Path, float],
    for_serving: bool = False,
) -> tuple[Row, ...]:
    """Check what a verb needs, disk first. `kernels` is precompiled, native, or anything else for a
    wheel; `need_gib` maps folders to GiB.

    For a bootstrap or, with `for_serving`, for running what was built.
    """
    wanted: set[Purpose] = {"serve"} if for_serving else {"cuda" if device == "cuda" else "cpu"}
    if kernels == "native" and not for_serving:
        wanted.add("native")
    case = Case(
        layout,
        settings,
        device=device,
        kernels=kernels,
        places=doctor_host.preflight_places(need_gib),
    )
    return examine(case, [check for check in CHECKS if check.purposes & wanted])


def examine(case: Case, checks: Sequence[Check]) -> tuple[Row, ...]:
    """Run checks beside each other and return their rows in the checks' order."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=max(1, len(checks))) as pool:
        return tuple(
            row for rows in pool.map(lambda check: _rows(check, case), checks) for row in rows
        )


def _rows(check: Check, case: Case) -> tuple[Row, ...]:
    """A machine in trouble must not end the look at the rest of it: files that cannot be read,
    answers of no known form.
    """
    name = check.look.__name__.replace("_", " ")
    try:
        return tuple(check.look(case))
    except WorkspaceError as exc:
        return (Row("warn", name, exc.message, "it could not be looked at", exc.hint),)
    except (OSError, ValueError) as exc:
        return (
            Row(
                "warn",
                name,
                f"could not be looked at: {exc}",
                "what the machine says there has no known form, or cannot be read",
            ),
        )


def show(
    layout: Layout,
    settings: Settings,
    *,
    console: Console,
    as_json: bool = False,
    offline: bool = False,
) -> None:
    """Print every row, or one JSON document. Raises ToolchainError where a row is FAIL."""
    case = Case(layout, settings, device=None, kernels=settings.text("KERNELS"))
    rows = examine(
        case, [check for check in CHECKS if not (offline and "network" in check.purposes)]
    )
    verdict = max((row.state for row in rows), key=ORDER.index, default="ok")
    if as_json:
        console.data(
            json.dumps(
                {"schema": SCHEMA, "rows": [asdict(row) for row in rows], "verdict": verdict},
                indent=1,
            )
        )
    else:
        _print(rows, console)
    bad = [row for row in rows if row.state == "FAIL"]
    if bad:
        raise ToolchainError(
            f"this machine lacks something: {', '.join(dict.fromkeys(row.name for row in bad))}",
            hint=bad[0].hint,
        )


def _print(rows: tuple[Row, ...], console: Console) -> None:
    """What is well on one line each; of the rest what was seen, why it matters and the command,
    each on its own line.
    """
    room = (_width() if console.is_terminal else sys.maxsize) - STATE_WIDTH - NAME_WIDTH
    indent = " " * (STATE_WIDTH + NAME_WIDTH)
    for row in rows:
        first, *more = _wrapped(row.seen, room)
        console.row(row.state, row.name, first)
        if row.state != "ok":
            more += _wrapped(row.why, room)
        for line in more:
            console.info(indent + line)
        if row.hint and row.state != "ok":
            # Never wrapped, so that it can be copied.
            console.info(f"{indent}$ {row.hint}", style="bold")
    counts = {state: sum(row.state == state for row in rows) for state in ORDER}
    console.info(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['FAIL']} in the way")


def _wrapped(text: str, room: int) -> list[str]:
    return textwrap.wrap(text, max(20, room), break_long_words=False, break_on_hyphens=False) or [
        ""
    ]


def _width() -> int:
    """Columns of the terminal that the rows are printed on, which is stderr's."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size((100, 24)).columns
