"""The doctor's check of the compiler cache: which one a build takes, its size and limit, and whether it can hit at all."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from workspace.environment import compiler_cache
from workspace.environment.doctor_case import Case, Row, State, without_user

# Room for the objects of two builds, compressed: an estimate, no measurement.
CACHE_GIB = {"cpu": 1.0, "cuda": 10.0}
_UNITS = {"": 1e9, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 1024.0, "mi": 1024.0**2, "gi": 1024.0**3, "ti": 1024.0**4}
_SCCACHE_REMOTES = re.compile(r"SCCACHE_(BUCKET|REDIS\w*|MEMCACHED\w*|GCS_BUCKET|AZURE_CONNECTION_STRING|GHA_ENABLED|WEBDAV_ENDPOINT|OSS_BUCKET)$")
_CONFIG_LINE = re.compile(r"^\((?P<origin>[^)]*)\) (?P<key>\w+) = ?(?P<value>.*)$", re.MULTILINE)


def ccache(case: Case) -> Iterator[Row]:
    """Check the compiler cache that a build takes, as a build sets it: its size, its limit, and whether it can hit."""
    cache = compiler_cache.find(case.settings)
    if cache is None:
        state: State = "warn" if case.is_native else "ok"
        yield Row(state, "ccache", "none", "without it every build from an empty folder compiles everything again", "sudo apt install ccache")
    else:
        yield _sccache(case, str(cache.program)) if cache.kind == "sccache" else _ccache(case, str(cache.program))


def _ccache(case: Case, program: str) -> Row:
    listed = case.ask([program, "--show-config"], extra=compiler_cache.configuration(case.layout, case.settings))
    config = {found["key"]: (found["value"].strip(), found["origin"]) for found in _CONFIG_LINE.finditer(listed.stdout)} if listed else {}
    why = "objects that were compiled before are taken from it"
    if not config or listed is None or listed.returncode != 0:
        return Row("warn", "ccache", f"{program} does not say how it is set up", why, f"{program} --show-config")
    done = case.ask([program, "--print-stats"])
    stats = dict(re.findall(r"^(\w+)\t(\d+)$", done.stdout if done else "", re.MULTILINE))
    value = {name: text for name, (text, _) in config.items()}
    limit_gib = size_gib(value.get("max_size", ""))
    used_gib = int(stats["cache_size_kibibyte"]) / 1024**2 if "cache_size_kibibyte" in stats else None
    words = [
        "size unknown" if used_gib is None else f"{used_gib:.1f} GiB" if used_gib else "empty",
        "no limit" if limit_gib == 0 else f"limit {value.get('max_size') or 'unknown'}",
        f"hash_dir {value.get('hash_dir', '?')}",
        f"base_dir {value.get('base_dir') or 'none'}",
        f"sloppiness {value.get('sloppiness') or 'none'}",
    ]
    if remote := value.get("remote_storage") or value.get("secondary_storage"):
        words.append("remote " + " ".join(without_user(place.split("|")[0]) for place in remote.split()))
    seen = f"{case.layout.relative(Path(program))}: {', '.join(words)}"
    faults = tuple(_ccache_faults(case, config, limit_gib))
    if not faults:
        return Row("ok", "ccache", seen, why)
    return Row("warn", "ccache", seen, "; ".join(harm for harm, _ in faults), " && ".join(cure for _, cure in faults))


def _ccache_faults(case: Case, config: dict[str, tuple[str, str]], limit_gib: float | None) -> Iterator[tuple[str, str]]:
    """Yield what keeps ccache from a hit, each with its cure."""
    for name, harm in (("disable", "it is switched off"), ("read_only", "it never keeps what it compiles"), ("recache", "it never takes what it has")):
        text, origin = config.get(name, ("", ""))
        if compiler_cache.is_on(text):
            variable = {"read_only": "CCACHE_READONLY"}.get(name, f"CCACHE_{name.upper()}")
            yield f"{harm} ({name})", f"unset {variable}" if origin == "environment" else f"ccache --set-config {name}=false"
    folder = Path(config["cache_dir"][0]) if config.get("cache_dir", ("",))[0] else None
    if folder and folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        yield f"{folder} cannot be written, nothing is kept", f'sudo chown -R "$USER" {shlex.quote(str(folder))}'
    need = CACHE_GIB[case.device]
    if limit_gib is not None and 0 < limit_gib < need * 0.9:
        yield f"a build may need {need:.0f} GiB and would push its own objects out", f"ccache --set-config max_size={2 * need:.0f}G"
    if compiler_cache.is_on(config.get("hash_dir", ("", ""))[0]):
        yield "with debug information an object counts for one clone only (hash_dir)", "unset CCACHE_HASHDIR"
    base = config.get("base_dir", ("", ""))[0]
    if base and not case.layout.root.is_relative_to(base):
        yield f"objects count for this clone only: it does not lie below {base} (base_dir)", "unset CCACHE_BASEDIR"


def _sccache(case: Case, program: str) -> Row:
    """Its statistics are not asked for: that would start its server. vLLM's own setup.py would take it too."""
    environment = case.settings.child_environment("build")
    said = case.said([program, "--version"])
    why = "objects that were compiled before are taken from it; with ccache instead, compilers step back and are measured"
    if said is None:
        return Row("warn", "ccache", f"{program} does not run, and vLLM would compile through it", why, "echo VLLM_DISABLE_SCCACHE=1 >> .env")
    limit = environment.get("SCCACHE_CACHE_SIZE") or "10G"
    remotes = sorted(name for name in environment if _SCCACHE_REMOTES.match(name))
    seen = f"{said}: limit {limit}, {environment.get('SCCACHE_DIR') or case.cache_home / 'sccache'}" + (f", remote by {', '.join(remotes)}" if remotes else "")
    limit_gib, need = size_gib(limit), CACHE_GIB[case.device]
    if not remotes and limit_gib is not None and limit_gib < need * 0.9:
        return Row("warn", "ccache", seen, f"a build may need {need:.0f} GiB and would push its own objects out", f"export SCCACHE_CACHE_SIZE={2 * need:.0f}G")
    return Row("ok", "ccache", seen, why)


def size_gib(text: str) -> float | None:
    """Return a size as ccache(1) and sccache write it, such as 5.0G or 500 MiB, in GiB; None where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    return float(found[1]) * _UNITS[found[2]] / 1024**3 if found and found[2] in _UNITS else None
