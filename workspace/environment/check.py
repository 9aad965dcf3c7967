"""Each setting, its value, where it came from, and whether it can do what it is meant to: `inv env`, and before bootstrap, smoke, serve and bench.

vLLM only warns of a name that it does not know. Here a value that it would stop at stops before anything is loaded, and so does a name that is no
name; what is without effect, or hides something else, is said.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.layout import Layout
from workspace.core.settings import KNOWN, SETTINGS, Settings, is_for, is_secret, is_set_by_the_workspace
from workspace.environment import conflicts, registry
from workspace.environment.conflicts import Finding
from workspace.environment.doctor_case import Case

State = Literal["ok", "warn", "FAIL"]
NAME_WIDTH, VALUE_WIDTH, SOURCE_WIDTH = 30, 28, 10
# Variables of the shell that are of interest here although no setting is called so.
_OF_INTEREST = re.compile(r"VLLM_\w+|HF_\w+|HUGGING_FACE_\w+|TRANSFORMERS_\w+|TIKTOKEN_\w+|TRITON_\w+|FLASHINFER_\w+|TORCHINDUCTOR_\w+|PYTORCH_\w+|VERBOSE")
_HIDES = re.compile(r"(?P<name>\w+)(=.*)? in the shell hides ", re.DOTALL)
_UNKNOWN = re.compile(r"\.env, line \d+: (?P<name>\w+) is no setting")


@dataclass(frozen=True)
class Row:
    """One setting. `value` is as it may be shown, `text` why the state is what it is, `cure` the next command; `is_said`: a door has printed it."""

    state: State
    name: str
    value: str
    source: str
    text: str
    cure: str | None = None
    is_said: bool = False


def show(layout: Layout, settings: Settings, *, console: Console, as_json: bool = False) -> None:
    """Print one row a setting; as JSON on stdout where a program asks. Raises SettingsError where one of them stops every verb."""
    rows = judge(Case(layout, settings, device=None, kernels=settings.text("KERNELS")))
    bad = [row for row in rows if row.state == "FAIL"]
    if as_json:
        shown = [{name: value for name, value in asdict(row).items() if name != "is_said"} for row in rows]
        console.data(json.dumps({"schema": 1, "rows": shown, "verdict": "fail" if bad else "pass"}, indent=1))
    else:
        for row in rows:
            text = row.text + (f"; {row.cure}" if row.cure else "")
            console.row(row.state, f"{row.name:<{NAME_WIDTH}}", f"{row.value:<{VALUE_WIDTH}} {row.source:<{SOURCE_WIDTH}}{text}".rstrip())
    _stop(bad)


def require(layout: Layout, settings: Settings, *, console: Console, recipe: Mapping[str, str] | None = None, device: str | None = None) -> None:
    """Print what is to be warned of, and that no door has printed yet. Raises SettingsError for what cannot be worked with.

    `recipe` is the environment of a recipe, `device` what the workspace is built for, where the caller knows it.
    """
    rows = judge(Case(layout, settings, device=device, kernels=settings.text("KERNELS")), recipe=recipe)
    for row in rows:
        if row.state == "warn" and not row.is_said:
            _warn(console, f"{_called(row)}: {row.text}" + (f"; {row.cure}" if row.cure else ""))
    _stop([row for row in rows if row.state == "FAIL"])


def judge(case: Case, *, recipe: Mapping[str, str] | None = None) -> tuple[Row, ...]:
    """Decide about every setting, and every variable that a running vLLM or a build would see; settings first, in their order."""
    settings = case.settings
    rows = {row.name: row for row in _stated(settings, recipe or {})}
    said = {name: _plain(settings, recipe or {}, name) for name, row in rows.items() if row.source != "default"}
    findings = (*_unknown_names(case, rows), *_misread(case, said), *_out_of_phase(rows), *conflicts.findings(case, said))
    for finding in findings:
        row = rows[finding.name]
        if row.state == "ok" or (row.state == "warn" and finding.is_error):
            text = settings.masked(finding.said)
            rows[finding.name] = replace(
                row, state="FAIL" if finding.is_error else "warn", text=text, cure=_away(row) if finding.cure is None else finding.cure, is_said=False
            )
    is_judged = bool(registry.known(case.layout))
    return tuple(_with_door(settings, row, is_judged=is_judged and bool(registry.VARIABLE.fullmatch(row.name))) for row in rows.values())


def _stated(settings: Settings, recipe: Mapping[str, str]) -> Iterator[Row]:
    for setting in SETTINGS:
        value = settings.values[setting.name]
        is_recipes = value.source == "default" and setting.name in recipe
        text, source = (recipe[setting.name], "recipe") if is_recipes else (value.text, value.source)
        yield Row("ok", setting.name, _shown(settings, setting.name, text), source, "" if text else setting.meaning)
    for name, value in settings.passed.items():
        yield Row("ok", name, _shown(settings, name, value.text), value.source, "")
    for name, text in recipe.items():
        if name not in KNOWN and name not in settings.passed and name not in settings.shell:
            yield Row("ok", name, _shown(settings, name, text), "recipe", "")
    for name, text in sorted(settings.shell.items()):
        if name not in KNOWN and name not in settings.passed and _OF_INTEREST.fullmatch(name):
            yield Row("ok", name, _shown(settings, name, text), "shell", "")


def _unknown_names(case: Case, rows: Mapping[str, Row]) -> Iterator[Finding]:
    """Names of vLLM's that the pinned tree does not read. One of a former release, or of the shell's, has no effect; one written here means something."""
    asked = [name for name, row in rows.items() if registry.VARIABLE.fullmatch(name) and name not in KNOWN and row.source != "default"]
    known = registry.known(case.layout) if asked else frozenset()
    if not known:
        return
    for name in asked:
        if name in known or not is_for(name, "run"):
            continue
        if former := registry.removed("variables").get(name):
            yield Finding(name, f"{former.sentence}; nothing is told of it")
            continue
        alike = registry.spelled_alike(name, known)
        like = f"did you mean {' or '.join(alike)}?" if alike else "nothing of a like name is there"
        is_error = rows[name].source != "shell"
        why = "; what a plugin reads can be exported in the shell" if is_error else ""
        yield Finding(name, f"the pinned vLLM reads no such variable; {like}{why}", is_error=is_error)


def _misread(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    # What is a setting here has a type here, which settings.py has held it to.
    asked = {name: text for name, text in said.items() if name not in KNOWN and not is_secret(name) and is_for(name, "run")}
    known = registry.known(case.layout) if asked else frozenset()
    for wrong in registry.misread(case.layout, case.settings, {name: text for name, text in asked.items() if name in known}):
        # What to write instead stands in the sentence.
        yield Finding(wrong.name, f"vLLM stops at this value: {wrong.said}" if wrong.is_error else wrong.said, wrong.is_error, None if wrong.is_error else "")


def _out_of_phase(rows: Mapping[str, Row]) -> Iterator[Finding]:
    for name, row in rows.items():
        if row.source == "default":
            continue
        if row.source == "recipe" and not is_for(name, "run"):
            yield Finding(name, "it is read while vLLM is built and by no running one", is_error=True)
        elif name not in KNOWN and is_set_by_the_workspace(name):
            yield Finding(name, "the workspace says this itself, from DEVICE, KERNELS and the pin; what is written is passed on to nobody")


def _with_door(settings: Settings, row: Row, *, is_judged: bool) -> Row:
    """Add what the doors have printed already of a variable: that the shell hides .env, that a name is unknown here; the tree's own word is better."""
    for warning in settings.warnings:
        found = _HIDES.match(warning) or (None if is_judged else _UNKNOWN.match(warning))
        if found and found["name"] == row.name and row.state == "ok":
            cure = f"unset {row.name}" if _HIDES.match(warning) else _away(row)
            return replace(row, state="warn", text=re.sub(r"; `unset .*$", "", warning), cure=cure, is_said=True)
    if row.state == "ok" and not row.text:
        phase = "builds" if not is_for(row.name, "run") else "running vLLM" if not is_for(row.name, "build") else "builds and running vLLM"
        return replace(row, text="for this workspace" if row.name in KNOWN and KNOWN[row.name].phase == "workspace" else f"for {phase}")
    return row


def _plain(settings: Settings, recipe: Mapping[str, str], name: str) -> str:
    if name in KNOWN:
        value = settings.values[name]
        return recipe.get(name, value.text) if value.source == "default" else value.text
    return settings.passed[name].text if name in settings.passed else settings.shell.get(name) or recipe.get(name, "")


def _shown(settings: Settings, name: str, text: str) -> str:
    if not text:
        return "unset"
    return "set" if is_secret(name) else settings.presentable(text)


def _away(row: Row) -> str:
    if row.source == "shell":
        return f"unset {row.name}"
    return f"sed -i '/^{row.name}=/d' .env" if row.source == ".env" else "take it out of the recipe" if row.source == "recipe" else ""


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
        raise SettingsError(f"{_called(first)}: {first.text}", hint=first.cure or "./scripts/inv env", details=more)
