"""The faults of this machine, each with the command that fixes it: `inv doctor`, and the preflight
of verbs that build.

A preflight selects from the one table of checks. Checks only read, and run in parallel.
"""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import hints, process
from workspace.core.console import Console, Row, State, failed
from workspace.core.errors import ToolchainError, WorkspaceError
from workspace.core.process import There
from workspace.core.settings import without_user
from workspace.machine import (
    doctor_host,
    doctor_toolchain,
    dotenv,
    run_environment,
    toolchain,
)
from workspace.machine.doctor_toolchain import required_compiler
from workspace.machine.machine import Case, Machine, unanswered

__all__ = ["CHECKS", "examine", "preflight", "required_compiler", "show"]

# The purpose of a check: a bootstrap for a device, compiling kernels. `inv doctor` runs all checks,
# `network` only without --offline.
Purpose = Literal["cpu", "cuda", "native", "network"]
SCHEMA = 1
# Compressed objects of two builds: an estimate, not a measurement.
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
    r"SCCACHE_(BUCKET|REDIS\w*|MEMCACHED\w*|GCS_BUCKET|AZURE_CONNECTION_STRING|GHA_ENABLED"
    r"|WEBDAV_ENDPOINT|OSS_BUCKET)$"
)
# The start-up file of a shell, and the line in it that evaluates what `inv completion` prints.
_START_UP = {
    "bash": (".bashrc", 'eval "$({} completion bash)"'),
    "zsh": (".zshrc", 'eval "$({} completion zsh)"'),
    "fish": (".config/fish/config.fish", "{} completion fish | source"),
}
_CONFIG_LINE = re.compile(r"^\((?P<origin>[^)]*)\) (?P<key>\w+) = ?(?P<value>.*)$", re.MULTILINE)


def ccache(case: Case) -> Iterator[Row]:
    """Check the compiler cache as a build configures it: size, limit, and what prevents hits."""
    cache = toolchain.find_cache(case.settings)
    if cache is None:
        state = State.WARN if case.is_native else State.OK
        why = "without it every build from an empty folder compiles everything again"
        yield Row(state, "ccache", "none", why, hints.text("machine.apt_ccache"))
    elif cache.kind == "sccache":
        yield _sccache(case, str(cache.program))
    else:
        yield _ccache(case, str(cache.program))


def _ccache(case: Case, program: str) -> Row:
    environment = toolchain.cache_configuration(case.layout, case.settings)
    listed = process.output_of(case.ask([program, "--show-config"], extra=environment))
    lines = _CONFIG_LINE.finditer(listed.value) if isinstance(listed, There) else ()
    config = {line["key"]: (line["value"].strip(), line["origin"]) for line in lines}
    why = "a build takes objects of former builds from it"
    if not config:
        seen = f"{program} does not print its configuration"
        look = hints.text("machine.ccache_config", program=program)
        row = Row(State.WARN, "ccache", seen, why, look)
        return row if isinstance(listed, There) else unanswered(row, listed, look=look)
    limit_gib = size_gib(config.get("max_size", ("", ""))[0])
    facts = ", ".join(_ccache_facts(case, program, config, limit_gib))
    seen = f"{case.layout.relative(Path(program))}: {facts}"
    faults = tuple(_ccache_faults(case, config, limit_gib))
    if not faults:
        return Row(State.OK, "ccache", seen, why)
    harms, commands = zip(*faults, strict=True)
    return Row(State.WARN, "ccache", seen, "; ".join(harms), " && ".join(commands))


def _ccache_facts(
    case: Case, program: str, config: Mapping[str, tuple[str, str]], limit_gib: float | None
) -> Iterator[str]:
    """Yield the facts that decide about hits: size, limit, and the settings of the hash."""
    done = case.ask([program, "--print-stats"])
    printed = done.value.stdout if isinstance(done, There) else ""
    stats = dict(re.findall(r"^(\w+)\t(\d+)$", printed, re.MULTILINE))
    value = {name: text for name, (text, _) in config.items()}
    used_gib = int(stats.get("cache_size_kibibyte", "0")) / 1024**2
    if "cache_size_kibibyte" not in stats:
        yield "size unknown"
    else:
        yield f"{used_gib:.1f} GiB" if used_gib else "empty"
    yield "no limit" if limit_gib == 0 else f"limit {value.get('max_size') or 'unknown'}"
    yield f"hash_dir {value.get('hash_dir', '?')}"
    yield f"base_dir {value.get('base_dir') or 'none'}"
    yield f"sloppiness {value.get('sloppiness') or 'none'}"
    if remote := value.get("remote_storage") or value.get("secondary_storage"):
        urls = (without_user(place.split("|")[0]) for place in remote.split())
        yield "remote " + " ".join(urls)


def _ccache_faults(
    case: Case, config: Mapping[str, tuple[str, str]], limit_gib: float | None
) -> Iterator[tuple[str, str]]:
    """Yield what prevents hits in ccache, each with the command that fixes it."""
    value = {name: text for name, (text, _) in config.items()}
    yield from _ccache_switches(config)
    folder = Path(value.get("cache_dir", ""))
    if value.get("cache_dir") and (fault := doctor_host.unusable_folder(folder)):
        yield f"{fault[0]}, so it keeps nothing", fault[1]
    need = CACHE_GIB[case.device]
    if limit_gib is not None and 0 < limit_gib < need * 0.9:
        yield _too_small(need), f"ccache --set-config max_size={2 * need:.0f}G"
    if toolchain.is_cache_on(value.get("hash_dir", "")):
        harm = "with debug information an object counts for one clone only (hash_dir)"
        yield harm, "unset CCACHE_HASHDIR"
    base = value.get("base_dir", "")
    if base and not case.layout.root.is_relative_to(base):
        harm = f"objects count for this clone only: it is not below {base} (base_dir)"
        yield harm, "unset CCACHE_BASEDIR"


def _ccache_switches(config: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for name, variable, harm in (
        ("disable", "CCACHE_DISABLE", "it is switched off"),
        ("read_only", "CCACHE_READONLY", "it never keeps what it compiles"),
        ("recache", "CCACHE_RECACHE", "it never uses what it has"),
    ):
        text, origin = config.get(name, ("", ""))
        if toolchain.is_cache_on(text):
            in_shell = origin == "environment"
            hint = (
                hints.text("machine.unset", name=variable)
                if in_shell
                else hints.text("machine.ccache_switch", name=name)
            )
            yield f"{harm} ({name})", hint


def _too_small(need_gib: float) -> str:
    return f"a build may need {need_gib:.0f} GiB and would evict its own objects"


def _sccache(case: Case, program: str) -> Row:
    """Check sccache, without its statistics: they would start its server.

    vLLM's own setup.py uses sccache too.
    """
    environment = case.settings.child_environment("build")
    version = case.first_line([program, "--version"])
    why = (
        "a build takes objects of former builds from it; with ccache instead, the workspace"
        " measures compilers and lowers their priority"
    )
    if not isinstance(version, There):
        seen = f"{program} does not run, and vLLM would compile through it"
        look = hints.text("machine.no_sccache")
        return unanswered(Row(State.WARN, "ccache", seen, why, look), version, look=look)
    limit = environment.get("SCCACHE_CACHE_SIZE") or "10G"
    remotes = sorted(name for name in environment if _SCCACHE_REMOTES.match(name))
    folder = environment.get("SCCACHE_DIR") or case.cache_home / "sccache"
    seen = f"{version.value}: limit {limit}, {folder}"
    seen += f", remote by {', '.join(remotes)}" if remotes else ""
    limit_gib, need = size_gib(limit), CACHE_GIB[case.device]
    if not remotes and limit_gib is not None and limit_gib < need * 0.9:
        hint = hints.text("machine.sccache_size", gib=2 * need)
        return Row(State.WARN, "ccache", seen, _too_small(need), hint)
    return Row(State.OK, "ccache", seen, why)


def size_gib(text: str) -> float | None:
    """Return a size of ccache(1) or sccache, such as 5.0G or 500 MiB, in GiB, else None."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    return float(found[1]) * _UNITS[found[2]] / 1024**3 if found and found[2] in _UNITS else None


def completion(case: Case) -> Iterator[Row]:
    """Check whether a start-up file of the user's shell names `inv completion`.

    The file may name another clone: the completion of one works in all.
    """
    name = Path(case.settings.shell.get("SHELL", "")).name
    if name not in _START_UP:
        return
    file, line = _START_UP[name]
    place = case.home / file
    with contextlib.suppress(OSError):
        if re.search(rf"inv\S* completion {name}\b", place.read_text(errors="replace")):
            yield Row(State.OK, "completion", f"{name} completes inv, by {place}")
            return
    line = line.format(shlex.quote(str(case.layout.root / "scripts" / "inv")))
    hint = hints.text("machine.completion", line=line, path=place)
    yield Row(State.OK, "completion", f"{name} does not complete verbs and values", hint=hint)


@dataclass(frozen=True)
class Check:
    """A check and the purposes for which a preflight runs it."""

    look: Callable[[Case], Iterator[Row]]
    purposes: frozenset[Purpose]


def _check(look: Callable[[Case], Iterator[Row]], *purposes: Purpose) -> Check:
    return Check(look, frozenset(purposes))


CHECKS: tuple[Check, ...] = (
    _check(doctor_host.disk, "cpu", "cuda", "native"),
    _check(doctor_host.folders, "cpu", "cuda", "native"),
    _check(doctor_host.owner),
    _check(doctor_host.rights),
    _check(doctor_host.architecture),
    _check(doctor_host.cores, "native"),
    _check(doctor_host.memory, "native"),
    _check(doctor_host.swap, "native"),
    _check(doctor_host.oom_daemon, "native"),
    _check(doctor_toolchain.python, "cpu", "cuda", "native"),
    _check(doctor_toolchain.git, "cpu", "cuda", "native"),
    _check(doctor_toolchain.git_identity),
    _check(doctor_toolchain.uv, "cpu", "cuda", "native"),
    _check(doctor_toolchain.headers, "cpu", "cuda", "native"),
    _check(doctor_toolchain.compiler, "cuda", "native"),
    _check(doctor_toolchain.cmake, "native"),
    _check(doctor_toolchain.ninja, "native"),
    _check(doctor_toolchain.patch, "native"),
    _check(ccache, "native"),
    _check(doctor_toolchain.driver, "cuda"),
    _check(doctor_toolchain.toolkit, "cuda", "native"),
    _check(doctor_toolchain.agreement, "cuda", "native"),
    _check(doctor_toolchain.archs, "native"),
    _check(dotenv.ptxas),
    _check(run_environment.library_path, "native"),
    _check(run_environment.numa_library, "cpu"),
    _check(doctor_toolchain.running_programs, "native"),
    _check(doctor_host.token),
    _check(doctor_host.settings),
    _check(completion),
    _check(doctor_host.proxy, "network"),
    _check(doctor_host.vllm, "network"),
    _check(doctor_host.triton, "network"),
    _check(doctor_host.index, "network"),
    _check(doctor_host.torch_index, "network"),
)


def preflight(
    machine: Machine,
    *,
    device: str,
    is_native: bool,
    need_gib: Mapping[Path, float],
    is_environment_due: bool = False,
) -> tuple[Row, ...]:
    """Check what a bootstrap or a rebuild needs, disk first.

    With `is_native` the verb compiles; with `is_environment_due` it installs what `.vllm` lacks.
    `need_gib` maps folders to GiB.
    """
    wanted: set[Purpose] = {"cuda" if device == "cuda" else "cpu"}
    wanted |= {"native"} if is_native else set()
    case = Case(
        machine,
        device=device,
        is_native=is_native,
        places=doctor_host.preflight_places(need_gib),
        is_environment_due=is_environment_due,
    )
    return examine(case, [check for check in CHECKS if check.purposes & wanted])


def examine(case: Case, checks: Sequence[Check]) -> tuple[Row, ...]:
    """Run checks in parallel and return their rows in the order of the checks."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=max(1, len(checks))) as pool:
        return tuple(
            row for rows in pool.map(lambda check: _rows(check, case), checks) for row in rows
        )


def _rows(check: Check, case: Case) -> tuple[Row, ...]:
    """Run one check; an unreadable file or an unknown output becomes a row, not an exception."""
    name = check.look.__name__.replace("_", " ")
    try:
        return tuple(check.look(case))
    except WorkspaceError as exc:
        return (Row(State.WARN, name, exc.message, "the check did not finish", exc.hint),)
    except (OSError, ValueError) as exc:
        why = "the machine's output is in an unknown form, or unreadable"
        return (Row(State.WARN, name, f"the check did not finish: {exc}", why),)


def show(
    machine: Machine,
    *,
    console: Console,
    as_json: bool = False,
    offline: bool = False,
    is_native: bool = False,
    more: Sequence[Row] = (),
) -> None:
    """Print every row, `more` of the built tree last, or one JSON document.

    With `is_native` the settings request compiled kernels, and a missing build tool is a failure.

    Raises ToolchainError where a row is FAIL.
    """
    case = Case(machine, is_native=is_native)
    checks = [check for check in CHECKS if not (offline and "network" in check.purposes)]
    rows = (*examine(case, checks), *more)
    if as_json:
        judged = [row.state for row in rows if row.state is not State.SKIPPED]
        verdict = max(judged, key=lambda state: state.gravity)
        records = [_record(row) for row in rows]
        console.document({"schema": SCHEMA, "rows": records, "verdict": verdict})
    else:
        console.stdout.rows(rows)
        states = [row.state for row in rows]
        counted = [State.OK, State.WARN, State.FAIL]
        counted += [State.SKIPPED] if State.SKIPPED in states else []
        console.stdout.info(", ".join(f"{states.count(state)} {state}" for state in counted))
    if faults := failed(rows):
        names = ", ".join(dict.fromkeys(row.name for row in faults))
        raise ToolchainError(f"checks of this machine fail: {names}", hint=faults[0].hint)


def _record(row: Row) -> dict[str, object]:
    names = {"state": "state", "name": "name", "seen": "text", "why": "why", "hint": "hint"}
    return {key: getattr(row, name) for key, name in names.items()}
