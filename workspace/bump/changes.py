"""What else a new base changes: requirements, compilers, names, sources, wheels, age.

It compares the content of two trees; the forecast prints the result.
"""

import contextlib
import datetime
import functools
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.checks import registry
from workspace.compile import externals
from workspace.core import hints, records
from workspace.core.errors import SettingsError, counted, listed
from workspace.core.files import read_regular
from workspace.core.known_settings import KNOWN
from workspace.core.paths import Layout
from workspace.core.settings import Settings, nearest
from workspace.machine import run_environment
from workspace.machine.run_environment import VARIABLE
from workspace.repo.checkout import Kind
from workspace.repo.git import Git, history
from workspace.repo.pins import Pin
from workspace.repo.upstream import Candidate
from workspace.server import flags as known_flags

_FLAG = re.compile(r"--[a-z][a-z0-9_-]*")

# Files that a forecast reads of both trees, besides those of the patches.
_LOOKED_AT = re.compile(
    r"requirements/.*\.txt|pyproject\.toml|CMakeLists\.txt|cmake/.*\.cmake|vllm/envs\.py"
    r"|vllm/engine/arg_utils\.py|vllm/entrypoints/.*cli_args\.py"
    r"|vllm/sampling_params\.py|vllm/entrypoints/openai/(chat_)?completion/protocol\.py"
    r"|vllm/config/\w+\.py"
)

Uses = Mapping[str, tuple[str, ...]]
Topic = Literal[
    "requirement",
    "minimum",
    "external",
    "sources",
    "variable",
    "flag",
    "moved",
    "precompiled",
    "smoke",
    "age",
    "unknown",
]
Difference = tuple[str | None, str | None]
# The values that a file gives each requirement, external project or minimum version.
Facts = dict[str, set[str]]
# Targets that this workspace does not build have requirements files of their own.
_REQUIREMENTS = re.compile(r"requirements/(common|cuda|cpu|build/(cuda|cpu|rust))\.txt")
# The sources of a compiled library; see install/plan.py.
_COMPILED = re.compile(r"csrc/.*|cmake/.*|CMakeLists\.txt")
# The name of the change for those that differ from the base, without its tag.
SINCE_BASE = "compiled sources since "
_MINIMA: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("CMake", re.compile(r"\bcmake_minimum_required\s*\(\s*VERSION\s+([0-9.]+)")),
    ("C++ compiler", re.compile(r"CMAKE_CXX_COMPILER_VERSION\s+VERSION_LESS\s+\"?([0-9.]+)")),
    (
        "torch of the kernels",
        re.compile(r"\bset\s*\(\s*TORCH_SUPPORTED_VERSION_CUDA\s+\"?([0-9.]+)"),
    ),
)
_REMARK = re.compile(r"#.*$", re.MULTILINE)


def used(layout: Layout, settings: Settings) -> tuple[Uses, Uses]:
    """Return the variables and flags in use here, each with its places: .env, shell, a recipe.

    No value is part of the result.
    """
    variables: dict[str, list[str]] = {}
    flags: dict[str, list[str]] = {}
    for name, value in (*settings.values.items(), *settings.passed.items()):
        # Settings of the workspace itself do not reach vLLM.
        if (
            VARIABLE.fullmatch(name)
            and value.text
            and value.source != "default"
            and (name not in KNOWN or KNOWN[name].phase != "workspace")
        ):
            variables.setdefault(name, []).append(value.source)
        if value.source == ".env":
            for flag in _flags_in(value.text):
                flags.setdefault(flag, []).append(".env")
    for name in settings.shell:
        if VARIABLE.fullmatch(name) and name not in KNOWN and name not in settings.passed:
            variables.setdefault(name, []).append("shell")
    for recipe in sorted((layout.root / "recipes").glob("*.toml")):
        place = layout.relative(recipe)
        for token in _tokens(recipe):
            if VARIABLE.fullmatch(token):
                variables.setdefault(token, []).append(place)
            for flag in _flags_in(token):
                flags.setdefault(flag, []).append(place)
    return tuple(
        {name: tuple(dict.fromkeys(places)) for name, places in found.items()}
        for found in (variables, flags)
    )  # type: ignore[return-value]


def _flags_in(text: str) -> Iterator[str]:
    """Yield the flags of a command line, spelled with dashes; cut off `.part` and `=value`."""
    for token in text.split():
        if found := _FLAG.match(token):
            yield found[0].replace("_", "-")


def _tokens(recipe: Path) -> Iterator[str]:
    """Yield every key and text of a recipe; keys of a table of flags also as `--key`."""
    with contextlib.suppress(OSError, records.DecodeError):
        yield from _walk(records.parse_toml(read_regular(recipe)), "")


def _walk(value: object, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if name in ("flags", "args", "arguments", "serve"):
                yield f"--{key}"
            yield from _walk(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, name)
    elif isinstance(value, str):
        yield value


@dataclass(frozen=True)
class Change:
    """A difference, or a fact that could not be found out (topic `unknown`).

    `where` are files or places of use; `remark` is the conclusion for the user.
    """

    topic: Topic
    name: str
    before: str | None = None
    after: str | None = None
    where: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Comparison:
    """The trees at the present base of `pin` and at the candidate.

    `differing` and `moved` are the results of history.changed and history.renames; `touched` are
    the paths of the patches.
    """

    pin: Pin
    candidate: Candidate
    differing: Mapping[str, Difference]
    moved: Mapping[str, str]
    touched: Iterable[str]


def work_out(
    git: Git, layout: Layout, settings: Settings, compared: Comparison
) -> tuple[Change, ...]:
    """Return everything that differs between the two trees and matters on this machine."""
    differing = compared.differing
    read = {path: pair for path, pair in differing.items() if _LOOKED_AT.fullmatch(path)}
    contents = history.blobs(git, [oid for pair in read.values() for oid in pair if oid])
    before = {path: contents.get(old, b"") for path, (old, _) in read.items() if old}
    after = {path: contents.get(new, b"") for path, (_, new) in read.items() if new}
    spelled = re.search(r"\d+\.\d+", settings.text("PYTHON_VERSION"))
    on_this = functools.partial(requirements_of, python=spelled[0] if spelled else None)
    return (
        *_facts("requirement", before, after, on_this),
        *_facts("minimum", before, after, minima_of),
        *_facts("external", before, after, externals_of),
        *_sources(differing),
        *_since_base(git, compared.candidate),
        *_names(layout, settings, before, after),
        *_moved(differing, compared.moved, compared.touched),
        *_precompiled_wheels(compared.pin, compared.candidate),
        *_smoke(before, after),
        *_age(settings, compared.candidate),
        *_unknown(compared.candidate),
    )


def requirements_of(
    path: str, content: str, *, python: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the requirements in a file that apply on this machine: canonical name and versions.

    Only files from which this workspace installs count. `python` is the version of the built
    environment, such as 3.12. An option of pip has its own spelling as its name.
    """
    if path == "pyproject.toml":
        lines = _build_requires(content)
    elif _REQUIREMENTS.fullmatch(path):
        lines = [
            re.sub(r"(^|\s)#.*", "", line).strip()
            for line in content.replace("\\\n", " ").splitlines()
        ]
    else:
        return
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    here = {"python_version": python, "python_full_version": f"{python}.0"} if python else {}
    for line in filter(None, lines):
        try:
            found = Requirement(line)
        except InvalidRequirement:
            option, _, argument = line.partition(" ")
            yield option, argument
            continue
        if found.marker is None or found.marker.evaluate(here):
            extras = f"[{','.join(sorted(found.extras))}]" if found.extras else ""
            yield (
                canonicalize_name(found.name),
                f"{extras}{found.url or found.specifier or 'any version'}",
            )


def minima_of(path: str, content: str) -> Iterator[tuple[str, str]]:
    """Yield the minimum versions of CMake, C++ compiler, torch and Python in a file."""
    if path == "pyproject.toml":
        found = _table(content, "project").get("requires-python")
        if isinstance(found, str):
            yield "Python", found
    elif path.endswith((".cmake", "CMakeLists.txt")):
        for name, pattern in _MINIMA:
            for version in pattern.findall(_REMARK.sub("", content)):
                yield name, version


def externals_of(path: str, content: str) -> Iterator[tuple[str, str]]:
    """Yield the projects that CMake fetches, with each possible value of GIT_TAG."""
    if not path.endswith((".cmake", "CMakeLists.txt")):
        return
    yield from externals.pinned(content)


def _facts(
    topic: Topic,
    before: Mapping[str, bytes],
    after: Mapping[str, bytes],
    read: Callable[[str, str], Iterator[tuple[str, str]]],
) -> Iterator[Change]:
    """Yield what differs between two sets of files; one change names all files that have it."""
    found: dict[tuple[str, str | None, str | None], list[str]] = {}
    for path in sorted(before.keys() | after.keys()):
        old, new = (
            _gathered(read(path, files[path].decode(errors="replace"))) if path in files else {}
            for files in (before, after)
        )
        for name in old.keys() | new.keys():
            if old.get(name) != new.get(name):
                found.setdefault((name, _joined(old.get(name)), _joined(new.get(name))), []).append(
                    path
                )
    # torch first: every build depends on it.
    for (name, was, is_now), places in sorted(
        found.items(),
        key=lambda entry: (not entry[0][0].startswith("torch"), entry[0][0], entry[1]),
    ):
        yield Change(topic, name, was, is_now, tuple(places))


def _gathered(pairs: Iterator[tuple[str, str]]) -> Facts:
    facts: Facts = {}
    for name, text in pairs:
        facts.setdefault(name, set()).add(text)
    return facts


def _joined(texts: set[str] | None) -> str | None:
    return "; ".join(sorted(texts)) if texts else None


def _sources(differing: Mapping[str, Difference]) -> Iterator[Change]:
    compiled = sorted(path for path in differing if _COMPILED.fullmatch(path))
    if compiled:
        yield Change(
            "sources",
            "compiled sources",
            None,
            f"{counted(len(compiled), 'file')} {'differs' if len(compiled) == 1 else 'differ'}",
            tuple(compiled),
            "the present kernels do not fit",
        )
    else:
        yield Change(
            "sources", "compiled sources", None, "none differ", (), "the present kernels fit"
        )


def compiled_since(git: Git, base: str, commit: str) -> tuple[str, ...]:
    """Return the compiled sources that differ between two commits."""
    differing = history.changed(git, base, commit)
    return tuple(sorted(path for path in differing if _COMPILED.fullmatch(path)))


def _since_base(git: Git, candidate: Candidate) -> Iterator[Change]:
    """Yield the compiled sources of a commit that differ from those of its precompiled wheel."""
    base = candidate.pin.base
    if base is None:
        return
    compiled = compiled_since(git, base.commit, candidate.base)
    count = f"{counted(len(compiled), 'file')} {'differs' if len(compiled) == 1 else 'differ'}"
    yield Change(
        "sources",
        f"{SINCE_BASE}{base.tag}",
        None,
        f"{count} ({listed(compiled)})" if compiled else "none differ",
        compiled,
        "inv rebuild compiles them (hybrid kernels)" if compiled else "its kernels fit",
    )


def _names(
    layout: Layout, settings: Settings, before: Mapping[str, bytes], after: Mapping[str, bytes]
) -> Iterator[Change]:
    variables, flags = used(layout, settings)
    kinds: tuple[tuple[Topic, Uses, Callable[[bytes], frozenset[str]], re.Pattern[str]], ...] = (
        ("variable", variables, run_environment.variables_of, re.compile(r"vllm/envs\.py")),
        (
            "flag",
            flags,
            known_flags.flags_of,
            re.compile(r"vllm/engine/arg_utils\.py|vllm/entrypoints/.*cli_args\.py"),
        ),
    )
    for topic, uses, known_in, files in kinds:
        if not uses:
            continue
        old, new = (
            frozenset().union(
                *(known_in(text) for path, text in side.items() if files.fullmatch(path))
            )
            for side in (before, after)
        )
        for name in sorted(uses):
            # argparse.BooleanOptionalAction makes a --no-X of every switch.
            spelled = (
                f"--{name.removeprefix('--no-')}"
                if name.startswith("--no-") and name not in old
                else name
            )
            if spelled in old and spelled not in new:
                like = nearest(spelled, new)
                yield Change(
                    topic,
                    name,
                    "known",
                    None,
                    uses[name],
                    f"did you mean {like}?" if like else "no similar name exists there",
                )


def _moved(
    differing: Mapping[str, Difference], moved: Mapping[str, str], touched: Iterable[str]
) -> Iterator[Change]:
    for path in sorted(set(touched)):
        old, new = differing.get(path, (None, None))
        if old and not new:
            yield Change(
                "moved",
                path,
                path,
                moved.get(path),
                (),
                "" if path in moved else "is gone, and no new file resembles it",
            )


def _precompiled_wheels(pin: Pin, candidate: Candidate) -> Iterator[Change]:
    for key, why in candidate.not_precompiled.items():
        if key.endswith(f"-{platform.machine()}"):
            present = pin.precompiled.get(key)
            yield Change(
                "precompiled",
                key,
                present.filename if present else None,
                None,
                (),
                f"{why}; kernels: --kernels native, or --kernels WHEEL",
            )


def _smoke(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> Iterator[Change]:
    """Yield what requests and configurations offer there or no longer offer; see coverage.toml."""
    old, new = (
        {
            name: path
            for path, content in files.items()
            for name in registry.offered(path, content.decode(errors="replace"))
        }
        for files in (before, after)
    )
    there = {part for part, _ in new}
    for part in sorted({part for part, _ in old} - there - {"features"}):
        place = next(path for (other, _), path in old.items() if other == part)
        yield Change("smoke", part, place, None, remark="checks/coverage.toml still lists it")
    for part, name in sorted(old.keys() ^ new.keys()):
        if part not in there and part != "features":
            continue
        known = registry.coverage().get(part, {}).get(name)
        remark = "" if known else "checks/coverage.toml does not list it"
        if isinstance(known, tuple):
            remark = f"judged by {', '.join(known)}"
        shown = name if part == "features" else f"{part}.{name}"
        yield Change("smoke", shown, old.get((part, name)), new.get((part, name)), remark=remark)


def require_min_age(candidate: Candidate, settings: Settings) -> None:
    """Raise SettingsError for a release younger than PIN_MIN_AGE_DAYS.

    A withdrawn or harmful release is usually noticed within days.
    """
    required_days, days = settings.count("PIN_MIN_AGE_DAYS") or 0, _days_since(candidate.published)
    tag = candidate.pin.tag
    hint = hints.text("bump.allow_recent", tag=list(candidate.argv))
    if days is None:
        raise SettingsError(
            f"the publication date of {tag} is unknown; PIN_MIN_AGE_DAYS requires"
            f" {required_days} days",
            hint=hint,
        )
    if days < required_days:
        raise SettingsError(
            f"{tag} was published {days:.1f} days ago; PIN_MIN_AGE_DAYS requires {required_days}",
            hint=hint,
        )


def _days_since(published: datetime.datetime | None) -> float | None:
    """Return the age of a release, or None if its publication date is unknown."""
    if published is None:
        return None
    return (datetime.datetime.now(datetime.UTC) - published).total_seconds() / 86400


def _age(settings: Settings, candidate: Candidate) -> Iterator[Change]:
    required_days = settings.count("PIN_MIN_AGE_DAYS") or 0
    days = _days_since(candidate.published)
    if days is None:
        yield Change(
            "age",
            candidate.pin.tag,
            None,
            None,
            (),
            f"publication date unknown; inv pin.bump requires {required_days} days"
            " (PIN_MIN_AGE_DAYS)",
        )
        return
    remark = (
        f"younger than the {required_days} days that inv pin.bump requires (PIN_MIN_AGE_DAYS)"
        if days < required_days
        else ""
    )
    yield Change("age", candidate.pin.tag, None, f"{days:.1f} days", (), remark)


def _unknown(candidate: Candidate) -> Iterator[Change]:
    if candidate.kind is Kind.RELEASE:
        text = (
            "a release archive has no history: only the tree shows whether upstream took a patch,"
            " and the commits that touched a file are unknown"
        )
        yield Change("unknown", "history", remark=text)
    for sentence in candidate.lacking:
        yield Change("unknown", "upstream", remark=sentence)


def _build_requires(content: str) -> list[str]:
    found = _table(content, "build-system").get("requires")
    return [line for line in found if isinstance(line, str)] if isinstance(found, list) else []


def _table(content: str, name: str) -> Mapping[str, object]:
    try:
        found = records.parse_toml(content).get(name)
    except records.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}
