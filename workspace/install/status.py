"""inv status: the state of each layer, the reasons of staleness, and the next command.

The row of Triton is here too; inv fix-triton uses its sentences.
"""

import json
from dataclasses import dataclass
from typing import Literal

from workspace.core.console import Console, State
from workspace.core.errors import PatchDrift, SmokeError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.install import plan, stamp
from workspace.machine import torch
from workspace.machine.machine import Machine
from workspace.machine.torch import Installed, TorchBuild
from workspace.repo import checkout, overview, patches, pins

TritonState = Literal["ok", "warn", "missing"]


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
        f"torch {build.version} pairs with {paired.removeprefix('==') if paired else 'none'}"
        if build
        else "there is no torch"
    )


def triton_row(layout: Layout, build: TorchBuild | None) -> tuple[TritonState, str] | None:
    """Return state and text of the row, None without a Triton and without a need for one."""
    installed, paired = torch.observe_triton(layout), torch.paired_triton(layout)
    if installed is None:
        return ("missing", f"none; {pairing(build, paired)}") if paired is not None else None
    recorded = stamp.read(layout.stamp("triton"))
    text = f"{installed.version} {origin(layout, installed)}; {pairing(build, paired)}"
    beside = recorded.inputs.get("torch") if recorded and installed.origin == "file" else None
    if build and beside not in (None, build.version):
        return (
            "warn",
            f"{text}; it was verified with torch {beside}: ./scripts/inv fix-triton --check",
        )
    if paired and not installed.is_meant and not is_met(paired, installed.version):
        return "warn", f"{text}: ./scripts/inv fix-triton"
    return "ok", text


def is_met(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


BOOTSTRAP = "./scripts/inv bootstrap"
LONGEST_TIME = 40


@dataclass(frozen=True)
class Row:
    state: State
    name: str
    text: str


def show(machine: Machine, *, console: Console, as_json: bool = False) -> None:
    """Print one row for each layer and the next command; with `as_json`, as JSON on stdout."""
    layout = machine.layout
    try:
        observed = plan.observe_on(machine)
        rows, following = _rows(layout, observed), pins.half_moved(layout) or next_command(observed)
    except PatchDrift as exc:
        # A broken series is one of the faults that this screen shows.
        rows, following = (Row("FAIL", "patches", exc.message),), exc.hint or "./scripts/inv patch"
    if all(row.state == "ok" for row in rows):
        following = f"nothing is due; after a change in vendor/vllm: {following}"
    if as_json:
        record = {
            "schema": 1,
            "rows": [{"state": row.state, "name": row.name, "text": row.text} for row in rows],
            "next": following,
        }
        console.data(json.dumps(record, indent=1))
        return
    for row in rows:
        console.row(row.state, row.name, row.text)
    console.info(f"next: {following}")


def require_built(machine: Machine) -> plan.Observation:
    """Return the state of a built workspace.

    Raises SmokeError with the stale layer and the next command.
    """
    observed = plan.observe_on(machine)
    for layer in (observed.environment, observed.kernels, observed.install):
        if layer.state != "ok":
            raise SmokeError(
                f"{layer.name} {layer.state}: {layer.why}", hint=next_command(observed)
            )
    return observed


def next_command(observed: plan.Observation) -> str:
    """Return the next command to type."""
    if observed.checkout.kind is checkout.Kind.FOREIGN:
        if observed.checkout.head is None:
            return checkout.keeping_command("vendor/vllm")
        return f"git -C vendor/vllm status   # it is {observed.checkout.detail}"
    if observed.stack and observed.stack.state is patches.State.IN_PROGRESS:
        return (
            "./scripts/inv patch.continue   # or --skip, --abort: an am, rebase, merge or"
            " cherry-pick is under way in vendor/vllm"
        )
    if observed.stack and observed.stack.state is patches.State.FOREIGN:
        return "./scripts/inv patch   # vendor/vllm does not descend from the pin: lists what to do"
    is_native_stale = observed.kernels_wanted.kind == "native" and observed.kernels.state == "stale"
    if (observed.needs_compilation or is_native_stale) and observed.environment.state == "ok":
        return "./scripts/inv rebuild"
    if any(
        layer.state != "ok" for layer in (observed.environment, observed.kernels, observed.install)
    ):
        return BOOTSTRAP
    return "./scripts/nox -s smoke"


def _rows(layout: Layout, observed: plan.Observation) -> tuple[Row, ...]:
    rows = [_pin(layout, observed), _source(layout, observed), _patches(observed)]
    built = observed.kernels.recorded
    texts = {
        "environment": (
            f"Python {observed.python.version}, torch {observed.torch.version}"
            if observed.python and observed.torch
            else ""
        ),
        "kernels": (
            f"{short_origin(built)}, {len(built.libraries)} compiled files" if built else ""
        ),
        "install": built.outcome.get("version", "") if built else "",
    }
    for layer in (observed.environment, observed.kernels, observed.install):
        rows.append(
            Row(layer.state, layer.name, layer.why if layer.state != "ok" else texts[layer.name])
        )
    if found := triton_row(layout, observed.torch):
        rows.append(Row(found[0], "triton", found[1]))
    rows.append(_smoke(layout, observed))
    return tuple(rows)


def short_origin(built: stamp.Stamp) -> str:
    """Return the recorded origin of the kernels without its hash."""
    return " ".join(token for token in built.inputs.get("origin", "").split() if len(token) < 64)


def _pin(layout: Layout, observed: plan.Observation) -> Row:
    text = f"{observed.pin.tag} {observed.pin.commit[:12]}"
    if Layout(layout.bump_sandbox).pins.exists():
        return Row("warn", "pin", f"{text}; it is being moved: ./scripts/inv pin")
    return Row("ok", "pin", text)


def _source(layout: Layout, observed: plan.Observation) -> Row:
    current = observed.checkout
    if observed.stack and (
        sentence := overview.moved(layout, observed.pin.name, observed.pin, current, observed.stack)
    ):
        return Row("warn", "source", sentence)
    state: State = {checkout.Kind.MISSING: "missing", checkout.Kind.FOREIGN: "FAIL"}.get(
        current.kind, "ok"
    )  # type: ignore[assignment]
    return Row(
        state, "source", current.detail if state == "ok" else f"vendor/vllm is {current.detail}"
    )


def _patches(observed: plan.Observation) -> Row:
    stack = observed.stack
    if stack is None:
        return Row("missing", "patches", "no checkout to apply them to")
    count = f"{len(stack.names)} {'patch' if len(stack.names) == 1 else 'patches'}"
    edited = (
        f"; {len(stack.dirty)} edited {'file' if len(stack.dirty) == 1 else 'files'}"
        if stack.dirty
        else ""
    )
    texts: dict[patches.State, tuple[State, str]] = {
        patches.State.APPLIED: ("ok", f"{count} applied"),
        patches.State.UNAPPLIED: (
            "missing" if stack.names else "ok",
            f"{count}, not applied" if stack.names else "none",
        ),
        patches.State.UNEXPORTED: (
            "warn",
            f"{count}; vendor/vllm has commits that are not in patches/vllm",
        ),
        patches.State.DIRTY: ("warn", f"{count}, not applied: edited files prevent it"),
        patches.State.IN_PROGRESS: (
            "FAIL",
            "an am, rebase, merge or cherry-pick is under way in vendor/vllm",
        ),
        patches.State.FOREIGN: ("FAIL", "vendor/vllm does not descend from the pin"),
        patches.State.MISSING: ("missing", "no checkout"),
    }
    state, text = texts[stack.state]
    return Row(state, "patches", text + edited)


def _smoke(layout: Layout, observed: plan.Observation) -> Row:
    try:
        record = json.loads(read_regular(layout.smoke_record))
        tree, edits, verdict, when = (
            record["tree"],
            record["dirty"],
            record["verdict"],
            record["time"],
        )
        if verdict not in ("pass", "fail") or not (
            isinstance(when, str) and len(when) < LONGEST_TIME and when.isprintable()
        ):
            raise ValueError("not a record of a smoke")
    except FileNotFoundError:
        return Row("missing", "smoke", "not run yet")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Row(
            "missing",
            "smoke",
            f"{layout.relative(layout.smoke_record)} is damaged and proves nothing",
        )
    if verdict != "pass":
        return Row("FAIL", "smoke", f"failed {when}")
    same = (
        observed.stack is not None
        and observed.stack.tree == tree
        and plan.edits_digest(layout, observed.stack) == edits
    )
    return Row(
        "ok" if same else "stale", "smoke", f"passed {when}" + ("" if same else ", on another tree")
    )
