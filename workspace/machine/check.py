"""Each setting, its value, its source, and whether it can work: `inv env`, and the check before
bootstrap, smoke, serve and bench.

vLLM only warns of an unknown name. Here a value or a name that vLLM would stop at is an error
before anything is loaded; a setting without effect, or one that hides another, is a warning.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import hints
from workspace.core.console import Console, Row, State, failed
from workspace.core.errors import SettingsError
from workspace.core.known_settings import KNOWN, SETTINGS, is_secret
from workspace.core.settings import (
    Settings,
    is_for,
    is_set_by_the_workspace,
    similar,
)
from workspace.machine import run_environment
from workspace.machine.arch import key
from workspace.machine.machine import Case, Machine
from workspace.machine.run_environment import ENCODINGS, missing_vocabularies

# Variables of the shell that concern vLLM although no setting has their name.
_OF_INTEREST = re.compile(
    r"VLLM_\w+|HF_\w+|HUGGING_FACE_\w+|TRANSFORMERS_\w+|TIKTOKEN_\w+|TRITON_\w+|FLASHINFER_\w+"
    r"|TORCHINDUCTOR_\w+|PYTORCH_\w+|VERBOSE|(UV|PIP)_(CONSTRAINT|OVERRIDE|REQUIRE_HASHES)"
)
# Variables that name a file or folder to read, without those that vLLM creates itself.
_NAMES_A_FILE = re.compile(r"VLLM_(?!\w*(CACHE|DUMP|RPC|RUST|XLA))\w+_(PATH|FILE|FOLDER)")
# The Triton that introduced the second assembler, and the first GPU that uses it
# (triton/backends/nvidia/compiler.py).
_SECOND_ASSEMBLER, _FIRST_GPU_OF_IT = (3, 6), (10, 0)


@dataclass(frozen=True)
class Finding:
    """A message on one variable. Without a hint of its own the hint is to remove the variable."""

    name: str
    message: str
    is_error: bool = False
    hint: str | None = None


def conflict_findings(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    """Find settings that contradict each other or the machine.

    `given` has the values that the user or a recipe sets, by name, without defaults.
    """
    given = {name: text for name, text in given.items() if text}
    for look in (_toolkit, _assemblers, _files, _vocabularies, _memory):
        yield from look(case, given)


def _toolkit(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    home = case.settings.path("CUDA_HOME") if "CUDA_HOME" in given else None
    if home and not home.is_dir():
        yield Finding("CUDA_HOME", "no such folder", is_error=case.device == "cuda")
    elif home and not (home / "bin" / "nvcc").is_file():
        yield Finding("CUDA_HOME", "it has no bin/nvcc, which FlashInfer and a native build run")


def _assemblers(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        own = case.settings.path(name) if name in given else None
        if own and not own.exists():
            message = "no such program; Triton skips it without a message and uses its own"
            yield Finding(name, message)
        elif own and (own.is_dir() or not os.access(own, os.X_OK)):
            message = "it cannot be executed: Triton stops there"
            yield Finding(name, message, is_error=case.device == "cuda")
    if "TRITON_PTXAS_PATH" in given and "TRITON_PTXAS_BLACKWELL_PATH" not in given:
        version = case.machine.packages().get("triton", "")
        capabilities = case.machine.capabilities
        newest = max(map(key, capabilities), default=())
        if key(version) >= _SECOND_ASSEMBLER and newest >= _FIRST_GPU_OF_IT:
            yield Finding(
                "TRITON_PTXAS_PATH",
                f"Triton {version} assembles for this GPU with TRITON_PTXAS_BLACKWELL_PATH, or its"
                " own assembler, and does not use this one",
            )


def _files(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    for name, text in given.items():
        if _NAMES_A_FILE.fullmatch(name) and "/" in text and not Path(text).expanduser().exists():
            yield Finding(name, "no such file or folder")
    home = case.settings.path("HF_HOME") if "HF_HOME" in given else None
    if home and home.exists() and not home.is_dir():
        yield Finding("HF_HOME", "it is not a folder", is_error=True)


def _vocabularies(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    """Find a folder of vocabularies that lacks a file.

    gpt-oss dies of it after its load, also with the harmony that has them built in
    (openai/harmony#95).
    """
    if ENCODINGS not in given:
        return
    missing = missing_vocabularies(Path(given[ENCODINGS]))
    built_in = case.machine.packages().get("oss-harmony")
    why = (
        f"oss-harmony {built_in} in .vllm has them built in"
        if built_in
        else "./scripts/inv serve.fetch fetches them for the models that need them"
    )
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        yield Finding(
            ENCODINGS,
            f"{' and '.join(missing)} {verb} missing, so gpt-oss would fail; the workspace"
            f" does not pass it on. {why}",
        )
    elif built_in:
        yield Finding(ENCODINGS, f"not needed: {why}")


def _memory(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    name = "VLLM_CPU_KVCACHE_SPACE"
    if name not in given:
        return
    if case.device == "cuda":
        yield Finding(
            name,
            "a vLLM with a GPU does not read it; --gpu-memory-utilization or"
            " --kv-cache-memory-bytes sets the size of the cache",
        )
    elif given[name].isdigit() and int(given[name]) > case.host().memory_gib:
        yield Finding(
            name,
            f"this machine, or its control group, has {case.host().memory_gib:.1f} GiB",
            is_error=True,
        )


@dataclass(frozen=True)
class SettingRow(Row):
    """One setting.

    `value` is safe to print, `text` explains the state; `is_sentence` means that the text names the
    variable and its place.
    """

    value: str = ""
    source: str = ""
    is_sentence: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.name, self.value, self.source, self.text)

    def record(self) -> dict[str, object]:
        return super().record() | {"value": self.value, "source": self.source}


def show(machine: Machine, *, console: Console, as_json: bool = False) -> None:
    """Print one row a setting, as JSON on stdout for a program.

    Raises SettingsError where a setting stops every verb.
    """
    rows = judge(Case(machine))
    console.show(rows, as_json=as_json, verdict="fail" if failed(rows) else "pass")
    _stop(rows)


def require(
    machine: Machine,
    *,
    console: Console,
    recipe: Mapping[str, str] | None = None,
    device: str | None = None,
) -> None:
    """Print each warning once in a process. Raises SettingsError for an unusable setting.

    `recipe` is the environment of a recipe, `device` the device of the build, where the caller has
    it.
    """
    rows = judge(Case(machine, device=device), recipe=recipe)
    for row in rows:
        if row.state == State.WARN:
            text = row.text if row.is_sentence else f"{_called(row)}: {row.text}"
            _warn(console, text, row.hint)
    _stop(rows)


def judge(case: Case, *, recipe: Mapping[str, str] | None = None) -> tuple[SettingRow, ...]:
    """Judge every setting, and every variable that a running vLLM or a build sees.

    The settings come first, in their order.
    """
    settings = case.settings
    rows = {row.name: row for row in _stated(settings, recipe or {})}
    given = {
        name: _plain(settings, recipe or {}, name)
        for name, row in rows.items()
        if row.source != "default"
    }
    findings = (
        *_unknown_names(case, rows),
        *_misread(case, given),
        *_out_of_phase(rows),
        *conflict_findings(case, given),
    )
    for finding in findings:
        row = rows[finding.name]
        if row.state == State.OK or (row.state == State.WARN and finding.is_error):
            rows[finding.name] = replace(
                row,
                state=State.FAIL if finding.is_error else State.WARN,
                text=settings.masked(finding.message),
                hint=_removal(row) if finding.hint is None else finding.hint,
                is_sentence=False,
            )
    # The tree's own list takes 20 ms to read: only where the settings do not know a name.
    is_judged = any(notice.kind == "unknown" for notice in settings.warnings) and bool(
        run_environment.known_variables(case.layout)
    )
    return tuple(
        _with_warning(
            settings,
            row,
            is_judged=is_judged and bool(run_environment.VARIABLE.fullmatch(row.name)),
        )
        for row in rows.values()
    )


def _setting(name: str, value: str, source: str, *, text: str = "") -> SettingRow:
    return SettingRow(State.OK, name, text, value=value, source=source)


def _stated(settings: Settings, recipe: Mapping[str, str]) -> Iterator[SettingRow]:
    for setting in SETTINGS:
        value = settings.values[setting.name]
        is_recipes = value.source == "default" and setting.name in recipe
        text, source = (
            (recipe[setting.name], "recipe") if is_recipes else (value.text, value.source)
        )
        yield _setting(
            setting.name,
            _shown(settings, setting.name, text),
            source,
            text="" if text else setting.meaning,
        )
    for name, value in settings.passed.items():
        yield _setting(name, _shown(settings, name, value.text), value.source)
    for name, text in recipe.items():
        if name not in KNOWN and name not in settings.passed and name not in settings.shell:
            yield _setting(name, _shown(settings, name, text), "recipe")
    for name, text in sorted(settings.shell.items()):
        if name not in KNOWN and name not in settings.passed and _OF_INTEREST.fullmatch(name):
            yield _setting(name, _shown(settings, name, text), "shell")


def _unknown_names(case: Case, rows: Mapping[str, SettingRow]) -> Iterator[Finding]:
    """Find names that the pinned tree does not read.

    A name of a former release, or in the shell, has no effect; one in .env or a recipe is an error.
    """
    wanted = [
        name
        for name, row in rows.items()
        if run_environment.VARIABLE.fullmatch(name)
        and name not in KNOWN
        and row.source != "default"
    ]
    known = run_environment.known_variables(case.layout) if wanted else frozenset()
    if not known:
        return
    for name in wanted:
        if name in known or not is_for(name, "run"):
            continue
        if former := run_environment.removed_names("variables").get(name):
            yield Finding(name, f"{former.sentence}; the workspace does not pass it on")
            continue
        alike = similar(name, known)
        like = f"did you mean {' or '.join(alike)}?" if alike else "no name is similar"
        is_error = rows[name].source != "shell"
        why = "; export a plugin's variable in the shell" if is_error else ""
        yield Finding(
            name, f"the pinned vLLM reads no such variable; {like}{why}", is_error=is_error
        )


def _misread(case: Case, given: Mapping[str, str]) -> Iterator[Finding]:
    # settings.py has already checked the settings against their types.
    wanted = {
        name: text
        for name, text in given.items()
        if name not in KNOWN and not is_secret(name) and is_for(name, "run")
    }
    known = run_environment.known_variables(case.layout) if wanted else frozenset()
    values = {name: text for name, text in wanted.items() if name in known}
    for wrong in run_environment.misread_values(case.layout, case.settings, values):
        if wrong.is_error:
            message = f"vLLM stops at this value: {wrong.message}"
            yield Finding(wrong.name, message, is_error=True)
        else:
            # The message contains the value to write instead.
            yield Finding(wrong.name, wrong.message, hint="")


def _out_of_phase(rows: Mapping[str, SettingRow]) -> Iterator[Finding]:
    for name, row in rows.items():
        if row.source == "default":
            continue
        if row.source == "recipe" and not is_for(name, "run"):
            yield Finding(name, "a build of vLLM reads it, a running vLLM does not", is_error=True)
        elif name not in KNOWN and is_set_by_the_workspace(name):
            yield Finding(
                name,
                "the workspace sets this itself, from DEVICE, KERNELS and the pin, and ignores"
                " this value",
            )


def _with_warning(settings: Settings, row: SettingRow, *, is_judged: bool) -> SettingRow:
    """Add the settings' own warning of a variable, else the phase that the variable is for.

    They warn where the shell hides .env, and of repeated and unknown names; for the latter the
    pinned tree's own answer (`is_judged`) is better.
    """
    if row.state != State.OK:
        return row
    for notice in settings.warnings:
        if notice.name == row.name and not (is_judged and notice.kind == "unknown"):
            return replace(
                row, state=State.WARN, text=notice.sentence, hint=notice.hint, is_sentence=True
            )
    return row if row.text else replace(row, text=f"for {_phase(row.name)}")


def _phase(name: str) -> str:
    if name in KNOWN and KNOWN[name].phase == "workspace":
        return "this workspace"
    if not is_for(name, "run"):
        return "builds"
    return "builds and running vLLM" if is_for(name, "build") else "running vLLM"


def _plain(settings: Settings, recipe: Mapping[str, str], name: str) -> str:
    if name in KNOWN:
        value = settings.values[name]
        return recipe.get(name, value.text) if value.source == "default" else value.text
    return (
        settings.passed[name].text
        if name in settings.passed
        else settings.shell.get(name) or recipe.get(name, "")
    )


def _shown(settings: Settings, name: str, text: str) -> str:
    if not text:
        return "unset"
    return "set" if is_secret(name) else settings.presentable(text)


def _removal(row: SettingRow) -> str:
    if row.source == "shell":
        return hints.text("machine.unset", name=row.name)
    if row.source == ".env":
        return hints.text("machine.drop_from_dotenv", name=row.name)
    return hints.text("machine.drop_from_recipe", name=row.name) if row.source == "recipe" else ""


def _called(row: SettingRow) -> str:
    value = "" if row.value in ("set", "unset") else f"={row.value}"
    return f"{row.name}{value} ({row.source})"


@functools.cache
def _warn(console: Console, text: str, hint: str | None) -> None:
    console.warn(text, hint=hint)


def _stop(rows: Sequence[SettingRow]) -> None:
    faults = [row for row in rows if row.state is State.FAIL]
    if faults:
        first = faults[0]
        more = tuple(f"{_called(row)}: {row.text}" for row in faults[1:])
        raise SettingsError(
            f"{_called(first)}: {first.text}",
            hint=first.hint or hints.text("inv.env"),
            details=more,
        )
