"""inv status: the state of each layer, the reasons of staleness, and the next command.

The row of Triton is here too; inv fix-triton uses its sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workspace.core import hints, records
from workspace.core.console import Console, Row, State
from workspace.core.errors import PatchDrift, SmokeError, ToolchainError, counted
from workspace.core.paths import Layout
from workspace.core.process import There
from workspace.install import plan, precompiled, stamp
from workspace.install.precompiled import text_of
from workspace.machine import doctor, gpu
from workspace.machine.machine import Machine
from workspace.machine.torch import Installed, TorchBuild
from workspace.repo import checkout, overview, patches, pins, series

# The key in the stamp's outcome: the libraries of which this GPU runs only PTX
# (device_code.driver_work), empty if there are none.
DRIVER_WORK = "compiled by the driver"
# The library of vLLM's attention on most GPUs, and what its first calls took on an H200
# (docs/evidence/gpu.md).
ATTENTION, ATTENTION_S = "_vllm_fa2_C", 203


def origin(layout: Layout, installed: Installed) -> str:
    """Return where a Triton came from; for a Triton that was built here, from which commit."""
    recorded = stamp.read(layout.stamp("triton"))
    if (
        recorded
        and recorded.outcome.get("version") == installed.version
        and installed.origin == "file"
    ):
        patched = f" and {recorded.inputs['patches']}" if recorded.inputs.get("patches") else ""
        return (
            f"built here from {recorded.inputs.get('commit', '')[:12]}"
            f" ({recorded.inputs.get('ref', '')}){patched}"
        )
    return {
        "index": "from an index",
        "file": f"from {installed.place}",
        "editable": f"editable, from {installed.place}",
    }[installed.origin]


def pairing(build: TorchBuild | None, paired: str | None) -> str:
    """Return which Triton the installed torch requires."""
    return (
        f"torch {build.version} pairs with {paired.removeprefix('==') if paired else 'no Triton'}"
        if build
        else "there is no torch"
    )


def triton_row(machine: Machine) -> Row | None:
    """Return the row of Triton, None without a Triton and without a need for one."""
    layout, installed, build = machine.layout, machine.triton(), machine.torch()
    paired = machine.paired_triton()
    if installed is None:
        text = f"none; {pairing(build, paired)}"
        return Row(State.MISSING, "triton", text) if paired is not None else None
    recorded = stamp.read(layout.stamp("triton"))
    text = f"{installed.version} {origin(layout, installed)}; {pairing(build, paired)}"
    beside = recorded.inputs.get("torch") if recorded and installed.origin == "file" else None
    if build and beside not in (None, build.version):
        text = f"{text}; it was verified with torch {beside}"
        return Row(State.WARN, "triton", text, hint=hints.text("install.check_triton"))
    if paired and not installed.is_meant and not is_met(paired, installed.version):
        return Row(State.WARN, "triton", text, hint=hints.text("install.fix_triton"))
    return Row(State.OK, "triton", text)


def is_met(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


LONGEST_TIME = 40


def show(machine: Machine, *, console: Console, as_json: bool = False) -> None:
    """Print one row for each layer and the next command; with `as_json`, as JSON on stdout."""
    layout = machine.layout
    try:
        observed = plan.observe_on(machine)
        rows, following = _rows(layout, observed), pins.half_moved(layout) or next_command(observed)
    except PatchDrift as exc:
        # A broken series is one of the faults that this screen shows.
        rows = (Row(State.FAIL, "patches", exc.message),)
        following = exc.hint or hints.text("inv.patch")
    if all(row.state is State.OK for row in rows):
        following = hints.text("install.after_change", command=following)
    console.show(rows, as_json=as_json, next=following)
    if not as_json:
        console.stdout.hint(following)


def require_built(machine: Machine) -> plan.Observation:
    """Return the state of a built workspace.

    Raises SmokeError with the stale layer and the next command.
    """
    observed = plan.observe_on(machine)
    for layer in observed.layers:
        if layer.state != "ok":
            raise SmokeError(
                f"{layer.name} {layer.state}: {layer.why}", hint=next_command(observed)
            )
    return observed


def require_runnable(machine: Machine) -> plan.Observation:
    """Return the state of a built workspace whose vLLM can compute here.

    Raises as `require_built` does, and ToolchainError for a GPU's build on a machine without a
    driver.
    """
    observed = require_built(machine)
    if lacks_gpu(observed.machine, observed.device):
        raise ToolchainError(
            "the build is for a GPU, and this machine has no NVIDIA driver",
            hint=next_command(observed),
        )
    return observed


def lacks_gpu(machine: Machine, device: str) -> bool:
    """Return whether a build for `device` needs a GPU of which nothing is here; a driver that fails
    counts as here.
    """
    return device == "cuda" and not gpu.is_installed(machine.settings.child_environment("plain"))


def next_command(observed: plan.Observation) -> str:
    """Return the next command to type."""
    if observed.checkout.kind is checkout.Kind.FOREIGN:
        if observed.checkout.head is None:
            return checkout.keeping_command("vendor/vllm")
        return hints.text("install.foreign_checkout", detail=observed.checkout.detail)
    if observed.stack and observed.stack.state is patches.State.IN_PROGRESS:
        return hints.text("install.operation_under_way")
    if observed.stack and observed.stack.state is patches.State.FOREIGN:
        if observed.stack.operation:
            return hints.text("install.bisect_reset")
        return hints.text("install.no_descendant")
    is_native_stale = observed.kernels_wanted.source.is_native and observed.kernels.state == "stale"
    if (observed.needs_compilation or is_native_stale) and observed.environment.state == "ok":
        return hints.text("inv.rebuild")
    if any(layer.state != "ok" for layer in observed.layers):
        return hints.text("inv.bootstrap")
    if lacks_gpu(observed.machine, observed.device):
        return hints.text("install.wheel_for_gpu")
    return hints.text("nox.smoke")


def _rows(layout: Layout, observed: plan.Observation) -> tuple[Row, ...]:
    rows = [_pin(layout, observed), _source(layout, observed), patches_row(observed.stack)]
    built = observed.kernels.recorded
    texts = {
        "environment": (
            f"Python {observed.python.version}, torch {observed.torch.version}"
            if observed.python and observed.torch
            else ""
        ),
        "kernels": (
            f"{text_of(built.kernels)}, {len(built.libraries)} compiled files" if built else ""
        ),
        "install": built.outcome.get("version", "") if built else "",
    }
    for layer in observed.layers:
        rows.append(
            Row(
                State(layer.state),
                layer.name,
                layer.why if layer.state != "ok" else texts[layer.name],
            )
        )
    rows.extend(device_rows(observed.machine))
    if sentence := driver_sentence(built):
        rows.append(Row(State.OK, "first use", sentence))
    if found := triton_row(observed.machine):
        rows.append(found)
    rows.append(_smoke(layout, observed))
    return tuple(rows)


def driver_sentence(built: stamp.Stamp | None) -> str | None:
    """Return which libraries the driver compiles at their first use, and the price; None if none.

    Reads the stamp: to ask the driver would cost each status up to a second.
    """
    work = built.outcome.get(DRIVER_WORK) if built else None
    if not work:
        return None
    sentence = f"the driver compiles PTX at the first use of {work}, once, and keeps it"
    if ATTENTION in work:
        from workspace.compile import costs, device_code

        units, seconds = costs.Costs(costs.read_table()).of_target(ATTENTION)
        sentence += (
            f"; the first attention calls took {ATTENTION_S} s for it on an H200. To compile"
            f" {ATTENTION} here takes {units} units, {seconds / 60:.0f} compiler-minutes, and does"
            f" not help: upstream has it for {device_code.LIBRARIES[ATTENTION].archs} only"
        )
    return sentence


def show_doctor(
    machine: Machine, *, console: Console, as_json: bool, offline: bool, more: Sequence[Row]
) -> None:
    """Print the doctor's rows, `more`, and those on a returned driver and on its first use."""
    doctor.show(
        machine,
        console=console,
        as_json=as_json,
        offline=offline,
        is_native=precompiled.is_native(machine.settings),
        more=(*more, *device_rows(machine, queries_driver=True), *first_use(machine.layout)),
    )


def first_use(layout: Layout) -> tuple[Row, ...]:
    """Return the row on code that the driver compiles at its first use, none if there is none."""
    sentence = driver_sentence(stamp.read(layout.stamp("vllm")))
    why = "the first request waits for it; inv bootstrap ends with a first token, which compiles it"
    return (Row(State.OK, "first use", sentence, why),) if sentence else ()


def device_rows(machine: Machine, *, queries_driver: bool = False) -> tuple[Row, ...]:
    """Return the row of a CPU build that was made while no driver answered, once one is here again.

    Status only looks for the driver's files; the doctor queries the driver. DEVICE=cpu is a choice.
    """
    recorded = stamp.read(machine.layout.stamp("environment"))
    is_away = recorded is not None and recorded.outcome.get(stamp.DRIVER) == stamp.AWAY
    environment = machine.settings.child_environment("plain")
    if not is_away or machine.settings.text("DEVICE") == "cpu" or not gpu.is_installed(environment):
        return ()
    here, again = "an NVIDIA driver is installed", hints.text("install.build_for_gpu")
    if queries_driver:
        answer = machine.driver.gpus()
        if not isinstance(answer, There):
            return ()
        here = f"{answer.value[0].name} answers"
    text = (
        f"built for the CPU when no driver answered; now {here}. DEVICE=cpu in .env keeps the CPU"
    )
    why = "vLLM uses a GPU only where it was built for one"
    return (Row(State.WARN, "device", text, why if queries_driver else "", again),)


def _pin(layout: Layout, observed: plan.Observation) -> Row:
    text = f"{observed.pin.tag} {observed.pin.commit[:12]}"
    if Layout(layout.bump_sandbox).pins.exists():
        return Row(State.WARN, "pin", f"{text}; it is being moved", hint=hints.text("inv.pin"))
    return Row(State.OK, "pin", text)


def _source(layout: Layout, observed: plan.Observation) -> Row:
    current = observed.checkout
    if observed.stack and (row := overview.moved(layout, observed.pin, current, observed.stack)):
        return row
    states = {checkout.Kind.MISSING: State.MISSING, checkout.Kind.FOREIGN: State.FAIL}
    state = states.get(current.kind, State.OK)
    text = current.detail if state is State.OK else f"vendor/vllm is {current.detail}"
    return Row(state, "source", text)


def patches_row(stack: patches.Stack | None) -> Row:
    """Return the row of the local patches; there is no stack without a checkout."""
    if stack is None:
        return Row(State.MISSING, "patches", "no checkout to apply them to")
    count = counted(len(stack.names), "patch", "patches")
    edited = f"; {counted(len(stack.dirty), 'edited file')}" if stack.dirty else ""
    if stack.untracked:
        edited += f"; {series.named_untracked(stack.untracked)}"
    texts: dict[patches.State, tuple[State, str]] = {
        patches.State.APPLIED: (State.OK, f"{count} applied"),
        patches.State.UNAPPLIED: (
            State.MISSING if stack.names else State.OK,
            f"{count}, not applied" if stack.names else "none",
        ),
        patches.State.UNEXPORTED: (
            State.WARN,
            f"{count}; vendor/vllm has commits that are not in patches/vllm",
        ),
        patches.State.DIRTY: (State.WARN, f"{count}, not applied: edited files prevent it"),
        patches.State.IN_PROGRESS: (
            State.FAIL,
            f"{count}; {stack.operation} is not finished in vendor/vllm",
        ),
        patches.State.FOREIGN: (
            State.FAIL,
            f"{stack.operation} is not finished in vendor/vllm"
            if stack.operation
            else "vendor/vllm does not descend from the pin",
        ),
        patches.State.MISSING: (State.MISSING, "no checkout"),
    }
    state, text = texts[stack.state]
    return Row(state, "patches", text + edited)


@dataclass(frozen=True)
class _Smoke:
    """What is read here of the record of a smoke."""

    tree: str | None
    dirty: str | None
    verdict: Literal["pass", "fail"]
    time: str

    def __post_init__(self) -> None:
        if len(self.time) >= LONGEST_TIME or not self.time.isprintable():
            raise ValueError("the time is not valid")


def _smoke(layout: Layout, observed: plan.Observation) -> Row:
    try:
        record = records.load(layout.smoke_record, _Smoke)
    except records.DecodeError:
        return Row(
            State.MISSING,
            "smoke",
            f"{layout.relative(layout.smoke_record)} is damaged and proves nothing",
        )
    if record is None:
        return Row(State.MISSING, "smoke", "not run yet")
    same = (
        observed.stack is not None
        and observed.stack.tree == record.tree
        and plan.edits_digest(layout, observed.stack) == record.dirty
    )
    state, verb = (State.OK, "passed") if record.verdict == "pass" else (State.FAIL, "failed")
    text = f"{verb} {record.time[:16].replace('T', ' ')} UTC"
    text += "" if same else ", on another tree"
    return Row(state if same else State.STALE, "smoke", text)
