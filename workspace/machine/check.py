"""Each setting, its value, where it came from, and whether it can do what it is meant to: `inv
env`, and before bootstrap, smoke, serve and bench.

vLLM only warns of a name that it does not know. Here a value that it would stop at stops before
anything is loaded, and so does a name that is no name; what is without effect, or hides something
else, is said.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout
from workspace.core.settings import (
    KNOWN,
    SETTINGS,
    Settings,
    fitting_jobs,
    is_for,
    is_secret,
    is_set_by_the_workspace,
)
from workspace.machine import interpreter, run_environment
from workspace.machine.case import Case, key
from workspace.machine.run_environment import ENCODINGS, missing_vocabularies

_ON = ("1", "true", "yes", "on")
# Variables of vLLM's that name something to be read; what is made where it is missing is none of
# them.
_NAMES_A_FILE = re.compile(r"VLLM_(?!\w*(CACHE|DUMP|RPC|RUST|XLA))\w+_(PATH|FILE|FOLDER)")
# Triton's second assembler, for these GPUs, came with 3.6 (triton/backends/nvidia/compiler.py).
_SECOND_ASSEMBLER, _FIRST_GPU_OF_IT = (3, 6), (10, 0)


@dataclass(frozen=True)
class Finding:
    """Something to say of one variable. Without a `cure` of its own the cure is to take it away."""

    name: str
    message: str
    is_error: bool = False
    hint: str | None = None


def conflict_findings(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    """Find what does not go together. `said` has what somebody said, by name; defaults are not in
    it.
    """
    said = {name: text for name, text in said.items() if text}
    for look in (_toolkit, _assemblers, _files, _vocabularies, _memory, _hub, _compilers, _torch):
        yield from look(case, said)


def _toolkit(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    home = case.settings.path("CUDA_HOME") if "CUDA_HOME" in said else None
    if home and not home.is_dir():
        yield Finding("CUDA_HOME", "there is no such folder", is_error=case.device == "cuda")
    elif home and not (home / "bin" / "nvcc").is_file():
        yield Finding(
            "CUDA_HOME", "there is no bin/nvcc in it, which FlashInfer and a native build call"
        )


def _assemblers(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        own = case.settings.path(name) if name in said else None
        if own and not own.exists():
            yield Finding(
                name, "there is no such program; Triton passes it over in silence and takes its own"
            )
        elif own and (own.is_dir() or not os.access(own, os.X_OK)):
            yield Finding(
                name,
                "it is no program that may be run: Triton stops there",
                is_error=case.device == "cuda",
            )
    if "TRITON_PTXAS_PATH" in said and "TRITON_PTXAS_BLACKWELL_PATH" not in said:
        version = interpreter.installed(case.layout).get("triton", "")
        newest = max(
            (key(gpu.capability) for gpu in case.host().gpus if gpu.capability), default=()
        )
        if key(version) >= _SECOND_ASSEMBLER and newest >= _FIRST_GPU_OF_IT:
            yield Finding(
                "TRITON_PTXAS_PATH",
                f"Triton {version} assembles for this GPU with TRITON_PTXAS_BLACKWELL_PATH, or its"
                " own; this one it does not take",
            )


def _files(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    for name, text in said.items():
        if _NAMES_A_FILE.fullmatch(name) and "/" in text and not Path(text).expanduser().exists():
            yield Finding(name, "there is no such file or folder")
    home = case.settings.path("HF_HOME") if "HF_HOME" in said else None
    if home and home.exists() and not home.is_dir():
        yield Finding("HF_HOME", "it is no folder", is_error=True)


def _vocabularies(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    """gpt-oss dies after its load where the folder that is named lacks a file, also with the
    harmony that has them built in (openai/harmony#95).
    """
    if ENCODINGS not in said:
        return
    missing = missing_vocabularies(Path(said[ENCODINGS]))
    built_in = interpreter.installed(case.layout).get("oss-harmony")
    why = (
        f"oss-harmony {built_in} in .vllm has them built in"
        if built_in
        else "./scripts/inv serve.fetch brings them where they are needed"
    )
    if missing:
        yield Finding(
            ENCODINGS,
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there, and gpt-oss"
            f" would die of it; it is left out. {why}",
        )
    elif built_in:
        yield Finding(ENCODINGS, f"not needed: {why}")


def _memory(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    name = "VLLM_CPU_KVCACHE_SPACE"
    if name not in said:
        return
    if case.device == "cuda":
        yield Finding(
            name,
            "a vLLM with a GPU does not read it; --gpu-memory-utilization or"
            " --kv-cache-memory-bytes says how large the cache is",
        )
    elif said[name].isdigit() and int(said[name]) > case.host().memory_gib:
        yield Finding(
            name,
            f"this machine, or its control group, has {case.host().memory_gib:.1f} GiB",
            is_error=True,
        )


def _hub(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    is_offline = said.get("HF_HUB_OFFLINE", "").lower() in _ON
    if is_offline and said.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        yield Finding(
            "VLLM_USE_MODELSCOPE",
            "HF_HUB_OFFLINE=1 says that no hub is asked, this one that another one is",
        )
    if (
        "TRANSFORMERS_OFFLINE" in said
        and (said["TRANSFORMERS_OFFLINE"].lower() in _ON) != is_offline
    ):
        yield Finding(
            "TRANSFORMERS_OFFLINE",
            f"HF_HUB_OFFLINE says the opposite ({'on' if is_offline else 'off'}), and that is what"
            " counts",
        )
    other = said.get("HUGGING_FACE_HUB_TOKEN")
    if other and said.get("HF_TOKEN") and other != said["HF_TOKEN"]:
        yield Finding("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN is another token and goes before it")


def _compilers(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    jobs, threads = case.settings.count("MAX_JOBS"), case.settings.count("NVCC_THREADS")
    if jobs and threads and threads > jobs:
        yield Finding(
            "NVCC_THREADS", f"more than MAX_JOBS={jobs}: one compiler with {jobs} threads will run"
        )
    if jobs and "MAX_JOBS" in said and case.device == "cuda":
        fitting = fitting_jobs(case.host().cores, case.host().memory_gib)
        if jobs > fitting:
            said_of = (
                f"FlashInfer starts as many compilers while vLLM runs; into this memory {fitting}"
                " fit (flashinfer-ai/flashinfer#3634)"
            )
            yield Finding("MAX_JOBS", said_of)
    if "TORCH_CUDA_ARCH_LIST" in said and case.device == "cpu":
        yield Finding("TORCH_CUDA_ARCH_LIST", "not used: the device is cpu")


def _torch(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    if "TORCH_INDEX_URL" in said and case.settings.switch("USE_EXISTING_TORCH"):
        yield Finding(
            "TORCH_INDEX_URL", "not asked: USE_EXISTING_TORCH=1 keeps the torch that is there"
        )


State = Literal["ok", "warn", "FAIL"]
NAME_WIDTH, VALUE_WIDTH, SOURCE_WIDTH = 30, 28, 10
# Variables of the shell that are of interest here although no setting is called so.
_OF_INTEREST = re.compile(
    r"VLLM_\w+|HF_\w+|HUGGING_FACE_\w+|TRANSFORMERS_\w+|TIKTOKEN_\w+|TRITON_\w+|FLASHINFER_\w+|TORCHINDUCTOR_\w+|PYTORCH_\w+|VERBOSE"
)
_HIDES = re.compile(r"(?P<name>\w+)(=.*)? in the shell hides ", re.DOTALL)
_UNKNOWN = re.compile(r"\.env, line \d+: (?P<name>\w+) is no setting")


@dataclass(frozen=True)
class Row:
    """One setting. `value` is as it may be shown, `text` why the state is what it is, `cure` the
    next command; `is_said`: a door has printed it.
    """

    state: State
    name: str
    value: str
    source: str
    text: str
    hint: str | None = None
    is_reported: bool = False


def show(layout: Layout, settings: Settings, *, console: Console, as_json: bool = False) -> None:
    """Print one row a setting; as JSON on stdout where a program asks. Raises SettingsError where
    one of them stops every verb.
    """
    rows = judge(Case(layout, settings, device=None, kernels=settings.text("KERNELS")))
    bad = [row for row in rows if row.state == "FAIL"]
    if as_json:
        shown = [
            {name: value for name, value in asdict(row).items() if name != "is_said"}
            for row in rows
        ]
        console.data(
            json.dumps({"schema": 1, "rows": shown, "verdict": "fail" if bad else "pass"}, indent=1)
        )
    else:
        for row in rows:
            text = row.text + (f"; {row.hint}" if row.hint else "")
            console.row(
                row.state,
                f"{row.name:<{NAME_WIDTH}}",
                f"{row.value:<{VALUE_WIDTH}} {row.source:<{SOURCE_WIDTH}}{text}".rstrip(),
            )
    _stop(bad)


def require(
    layout: Layout,
    settings: Settings,
    *,
    console: Console,
    recipe: Mapping[str, str] | None = None,
    device: str | None = None,
) -> None:
    """Print what is to be warned of, and that no door has printed yet. Raises SettingsError for
    what cannot be worked with.

    `recipe` is the environment of a recipe, `device` what the workspace is built for, where the
    caller knows it.
    """
    rows = judge(
        Case(layout, settings, device=device, kernels=settings.text("KERNELS")), recipe=recipe
    )
    for row in rows:
        if row.state == "warn" and not row.is_reported:
            _warn(console, f"{_called(row)}: {row.text}" + (f"; {row.hint}" if row.hint else ""))
    _stop([row for row in rows if row.state == "FAIL"])


def judge(case: Case, *, recipe: Mapping[str, str] | None = None) -> tuple[Row, ...]:
    """Decide about every setting, and every variable that a running vLLM or a build would see;
    settings first, in their order.
    """
    settings = case.settings
    rows = {row.name: row for row in _stated(settings, recipe or {})}
    said = {
        name: _plain(settings, recipe or {}, name)
        for name, row in rows.items()
        if row.source != "default"
    }
    findings = (
        *_unknown_names(case, rows),
        *_misread(case, said),
        *_out_of_phase(rows),
        *conflict_findings(case, said),
    )
    for finding in findings:
        row = rows[finding.name]
        if row.state == "ok" or (row.state == "warn" and finding.is_error):
            text = settings.masked(finding.message)
            rows[finding.name] = replace(
                row,
                state="FAIL" if finding.is_error else "warn",
                text=text,
                hint=_away(row) if finding.hint is None else finding.hint,
                is_reported=False,
            )
    is_judged = bool(run_environment.known_variables(case.layout))
    return tuple(
        _with_door(
            settings,
            row,
            is_judged=is_judged and bool(run_environment.VARIABLE.fullmatch(row.name)),
        )
        for row in rows.values()
    )


def _stated(settings: Settings, recipe: Mapping[str, str]) -> Iterator[Row]:
    for setting in SETTINGS:
        value = settings.values[setting.name]
        is_recipes = value.source == "default" and setting.name in recipe
        text, source = (
            (recipe[setting.name], "recipe") if is_recipes else (value.text, value.source)
        )
        yield Row(
            "ok",
            setting.name,
            _shown(settings, setting.name, text),
            source,
            "" if text else setting.meaning,
        )
    for name, value in settings.passed.items():
        yield Row("ok", name, _shown(settings, name, value.text), value.source, "")
    for name, text in recipe.items():
        if name not in KNOWN and name not in settings.passed and name not in settings.shell:
            yield Row("ok", name, _shown(settings, name, text), "recipe", "")
    for name, text in sorted(settings.shell.items()):
        if name not in KNOWN and name not in settings.passed and _OF_INTEREST.fullmatch(name):
            yield Row("ok", name, _shown(settings, name, text), "shell", "")


def _unknown_names(case: Case, rows: Mapping[str, Row]) -> Iterator[Finding]:
    """Names of vLLM's that the pinned tree does not read. One of a former release, or of the
    shell's, has no effect; one written here means something.
    """
    asked = [
        name
        for name, row in rows.items()
        if run_environment.VARIABLE.fullmatch(name)
        and name not in KNOWN
        and row.source != "default"
    ]
    known = run_environment.known_variables(case.layout) if asked else frozenset()
    if not known:
        return
    for name in asked:
        if name in known or not is_for(name, "run"):
            continue
        if former := run_environment.removed_names("variables").get(name):
            yield Finding(name, f"{former.sentence}; nothing is told of it")
            continue
        alike = run_environment.spelled_alike(name, known)
        like = f"did you mean {' or '.join(alike)}?" if alike else "nothing of a like name is there"
        is_error = rows[name].source != "shell"
        why = "; what a plugin reads can be exported in the shell" if is_error else ""
        yield Finding(
            name, f"the pinned vLLM reads no such variable; {like}{why}", is_error=is_error
        )


def _misread(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    # What is a setting here has a type here, which settings.py has held it to.
    asked = {
        name: text
        for name, text in said.items()
        if name not in KNOWN and not is_secret(name) and is_for(name, "run")
    }
    known = run_environment.known_variables(case.layout) if asked else frozenset()
    for wrong in run_environment.misread_values(
        case.layout, case.settings, {name: text for name, text in asked.items() if name in known}
    ):
        # What to write instead stands in the sentence.
        yield Finding(
            wrong.name,
            f"vLLM stops at this value: {wrong.message}" if wrong.is_error else wrong.message,
            wrong.is_error,
            None if wrong.is_error else "",
        )


def _out_of_phase(rows: Mapping[str, Row]) -> Iterator[Finding]:
    for name, row in rows.items():
        if row.source == "default":
            continue
        if row.source == "recipe" and not is_for(name, "run"):
            yield Finding(
                name, "it is read while vLLM is built and by no running one", is_error=True
            )
        elif name not in KNOWN and is_set_by_the_workspace(name):
            yield Finding(
                name,
                "the workspace says this itself, from DEVICE, KERNELS and the pin; what is written"
                " is passed on to nobody",
            )


def _with_door(settings: Settings, row: Row, *, is_judged: bool) -> Row:
    """Add what the doors have printed already of a variable: that the shell hides .env, that a name
    is unknown here; the tree's own word is better.
    """
    for warning in settings.warnings:
        found = _HIDES.match(warning) or (None if is_judged else _UNKNOWN.match(warning))
        if found and found["name"] == row.name and row.state == "ok":
            hint = f"unset {row.name}" if _HIDES.match(warning) else _away(row)
            return replace(
                row,
                state="warn",
                text=re.sub(r"; `unset .*$", "", warning),
                hint=hint,
                is_reported=True,
            )
    if row.state == "ok" and not row.text:
        phase = (
            "builds"
            if not is_for(row.name, "run")
            else "running vLLM"
            if not is_for(row.name, "build")
            else "builds and running vLLM"
        )
        return replace(
            row,
            text=(
                "for this workspace"
                if row.name in KNOWN and KNOWN[row.name].phase == "workspace"
                else f"for {phase}"
            ),
        )
    return row


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


def _away(row: Row) -> str:
    if row.source == "shell":
        return f"unset {row.name}"
    return (
        f"sed -i '/^{row.name}=/d' .env"
        if row.source == ".env"
        else "take it out of the recipe"
        if row.source == "recipe"
        else ""
    )


def _called(row: Row) -> str:
    value = "" if row.value in ("set", "unset") else f"={row.value}"
    return f"{row.name}{value} ({row.source})"


@functools.cache
def _warn(console: Console, text: str) -> None:
    console.warn(text)


def _stop(bad: list[Row]) -> None:
    if bad:
        first = bad[0]
        more = tuple(f"{_called(row)}: {row.text}" for row in bad[1:])
        raise SettingsError(
            f"{_called(first)}: {first.text}", hint=first.hint or "./scripts/inv env", details=more
        )
