"""Each setting, its value, its source, and whether it can work: `inv env`, and the check before
bootstrap, smoke, serve and bench; and the lines of .env: the first ones, and changes to them.

vLLM only warns of an unknown name. Here a value or a name that vLLM would stop at is an error
before anything is loaded; a setting without effect, or one that hides another, is a warning.

`write` creates .env only where none exists. In a user's file every changed line remains as a
comment: no line is lost.
"""

import difflib
import functools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from workspace.core import hints
from workspace.core import settings as settings_module
from workspace.core.console import Console, Row, State, failed
from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.files import read_regular, write_atomic
from workspace.core.known_settings import KNOWN, SETTINGS, is_secret
from workspace.core.paths import Layout
from workspace.core.settings import Settings, is_for, is_set_by_the_workspace, similar
from workspace.machine import run_environment
from workspace.machine.arch import suggest_list
from workspace.machine.machine import Case, Machine
from workspace.machine.run_environment import Finding, conflict_findings

# Variables of the shell that concern vLLM although no setting has their name.
_OF_INTEREST = re.compile(
    r"VLLM_\w+|HF_\w+|HUGGING_FACE_\w+|TRANSFORMERS_\w+|TIKTOKEN_\w+|TRITON_\w+|FLASHINFER_\w+"
    r"|TORCHINDUCTOR_\w+|PYTORCH_\w+|VERBOSE|(UV|PIP)_(CONSTRAINT|OVERRIDE|REQUIRE_HASHES)"
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
            hint=first.hint,
            details=more,
        )


KV_CACHE_SHARE = 1 / 6
_PLAIN = re.compile(r"[\w/.,:;+@%=-]*")


def write(machine: Machine, *, device: str) -> str:
    """Write `.env`, readable by its owner only, and return its lines as `NAME=value` pairs."""
    archs = machine.settings.text("TORCH_CUDA_ARCH_LIST")
    lines = suggest(machine, device=device, archs=archs)
    head = (
        "# Settings of this clone; .env.example explains every one. A variable in the shell goes"
        " before a line here.\n"
    )
    write_atomic(
        machine.layout.dotenv,
        (head + "".join(f"{name}={text}\n" for name, text in lines.items())).encode(),
        mode=0o600,
    )
    return (
        ", ".join(f"{name}={text}" for name, text in lines.items()) or "this machine needs no line"
    )


def suggest(machine: Machine, *, device: str, archs: str = "") -> dict[str, str]:
    """Decide the lines from the machine.

    `archs` is the architecture list of this run; it counts where no GPU reports its capability.
    """
    if device == "cpu":
        share_gib = machine.host().memory_gib * KV_CACHE_SHARE
        return {"VLLM_CPU_KVCACHE_SPACE": str(max(1, int(share_gib)))}
    lines: dict[str, str] = {}
    if device == "cuda":
        if toolkit := machine.toolkit():
            lines["CUDA_HOME"] = str(toolkit.home)
        capabilities = sorted(set(machine.capabilities))
        if wanted := suggest_list(capabilities) or archs:
            lines["TORCH_CUDA_ARCH_LIST"] = wanted
    return lines


def changed(text: str, changes: Mapping[str, str | None], *, why: str) -> str:
    """Return the text of a .env with other values; None removes a name.

    A line that no longer counts becomes a comment, with `why` above it.
    """
    lines = [f"{line}\n" for line in text.splitlines()]
    for name, value in changes.items():
        own = re.compile(rf"\s*(export\s+)?{re.escape(name)}\s*=")
        after: list[str] = []
        at = 0
        for line in lines:
            is_own = own.match(line) is not None
            after += [f"# {why}\n"] if is_own and not at else []
            after.append(f"# {line}" if is_own else line)
            at = len(after) if is_own else at
        if value is not None:
            after += [] if at else [f"# {why}\n"]
            after.insert(
                at or len(after),
                f"{name}={value if _PLAIN.fullmatch(value) else shlex.quote(value)}\n",
            )
        lines = after
    return "".join(lines)


def change(layout: Layout, changes: Mapping[str, str | None], *, why: str) -> tuple[str, ...]:
    """Write the text that `changed` returns, and return the difference as lines of diff(1).

    Raises OSError where .env cannot be written.
    """
    try:
        before, mode = read_regular(layout.dotenv).decode(), layout.dotenv.stat().st_mode & 0o777
    except FileNotFoundError:
        before, mode = "", 0o600
    after = changed(before, changes, why=why)
    # The user's file may be a link: its target is written.
    write_atomic(layout.dotenv.resolve(), after.encode(), mode=mode)
    return tuple(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), ".env", ".env", n=0, lineterm=""
        )
    )


WHY = "by inv env.init, for this machine"


def complete(machine: Machine, *, console: Console, replace: bool = False) -> None:
    """Write or complete .env and print the difference.

    `replace` also changes lines with other values; each old line remains as a comment beside the
    new line. Raises ToolchainError where .env cannot be written.
    """
    case, layout, settings = Case(machine), machine.layout, machine.settings
    if not layout.dotenv.exists():
        lines = write(machine, device=case.device)
        console.row(State.DONE, ".env", f"written for this machine: {lines}")
    written, wanted = settings_module.written(layout), propose(case)
    rows: list[Row] = []
    changes: dict[str, str | None] = {
        name: text for name, text in wanted.items() if name not in written
    }
    for name, text in wanted.items():
        present = written.get(name)
        if present == text:
            rows.append(Row(State.OK, name, text))
        elif present is not None and replace:
            changes[name] = text
        elif present is not None:
            seen = f"{present}; this machine suggests {text}"
            hint = hints.text("machine.replace_dotenv")
            rows.append(Row(State.KEPT, name, seen, hint=hint))
    console.rows(rows)
    if not changes:
        console.row(State.SKIPPED, ".env", "nothing to write")
        return
    try:
        difference = change(layout, changes, why=WHY)
    except OSError as exc:
        raise ToolchainError(
            f".env cannot be written: {exc.strerror}",
            hint=hints.text("core.list_folders", folders=[layout.dotenv, layout.root]),
        ) from exc
    for line in difference:
        console.data(settings.masked(line))


def propose(case: Case) -> dict[str, str]:
    """Decide the lines for this machine: those of bootstrap, and a ptxas.

    A ptxas is proposed where Triton's own fails for the GPU and the toolkit's works.
    """
    lines = suggest(case.machine, device=case.device)
    return lines | (_assembler(case) if case.device == "cuda" else {})


def _assembler(case: Case) -> dict[str, str]:
    # The checks of the doctor take 50 ms to import, and only this proposal needs one.
    from workspace.machine import doctor

    there = case.triton()
    if there is None or there.bin is None or case.toolkit() is None:
        return {}
    capability = doctor.capability_of(case)
    assemblers = doctor.ptxas_of_triton(there.bin, there.version, capability)
    used = next(assembler for assembler in assemblers if assembler.is_used)
    if doctor.judge_ptxas(used, case.settings, capability, case.ask).is_good:
        return {}
    program = doctor.toolkits_ptxas(case, capability)
    return {used.variable: str(program)} if program else {}
