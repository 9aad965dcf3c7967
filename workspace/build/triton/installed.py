"""What is said of the Triton in `.vllm`: where it came from, and whether it is what torch, or the one who built it, means to have there."""

from typing import Literal

from workspace.build import stamp
from workspace.core.layout import Layout
from workspace.environment import triton
from workspace.environment.torch import TorchBuild
from workspace.environment.triton import Installed

State = Literal["ok", "warn", "missing"]


def origin(layout: Layout, there: Installed) -> str:
    """Say where a Triton came from; of one that was built here, from which commit."""
    recorded = stamp.read(layout.stamp("triton"))
    if recorded and recorded.outcome.get("version") == there.version and there.origin == "file":
        patched = f" and {recorded.inputs['patches']}" if recorded.inputs.get("patches") else ""
        return f"built here from {recorded.inputs.get('commit', '')[:12]} ({recorded.inputs.get('ref', '')}){patched}"
    return {"index": "from an index", "file": f"from {there.place}", "editable": f"editable, from {there.place}"}[there.origin]


def pairing(build: TorchBuild | None, paired: str | None) -> str:
    """Say which Triton the installed torch asks for."""
    return f"torch {build.version} pairs with {paired.removeprefix('==') if paired else 'none'}" if build else "there is no torch"


def row(layout: Layout, build: TorchBuild | None) -> tuple[State, str] | None:
    """Return state and text of a line on a screen; None where there is no Triton and nothing asks for one."""
    there, paired = triton.observe(layout), triton.paired(layout)
    if there is None:
        return ("missing", f"none; {pairing(build, paired)}") if paired is not None else None
    recorded = stamp.read(layout.stamp("triton"))
    text = f"{there.version} {origin(layout, there)}; {pairing(build, paired)}"
    beside = recorded.inputs.get("torch") if recorded and there.origin == "file" else None
    if build and beside not in (None, build.version):
        return "warn", f"{text}; it was proven beside torch {beside}: ./scripts/inv fix-triton --check"
    if paired and not there.is_meant and not is_met(paired, there.version):
        return "warn", f"{text}: ./scripts/inv fix-triton"
    return "ok", text


def is_met(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)
