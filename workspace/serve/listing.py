"""`inv serve.list`: one row a recipe: does it fit here, what does it need, what is free, is it on disk."""

import json

from workspace.core.console import Console, State
from workspace.core.errors import SettingsError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import running
from workspace.environment.doctor_case import Case
from workspace.serve import fit, recipes, weights
from workspace.source import pins

NAME_WIDTH = 16
_STATES: dict[fit.Verdict, State] = {"yes": "ok", "after drop-caches": "warn", "no": "warn"}
_DEVICES = {"cuda": "on the GPU", "cpu": "on the processor"}


def show(layout: Layout, settings: Settings, *, console: Console, as_json: bool = False) -> None:
    """Print the recipes; as JSON on stdout where a program asks. A recipe with something wrong in it is a row that says so."""
    device = Case(layout, settings, device=None, kernels=settings.text("KERNELS")).device
    free = fit.observe(settings, device=device)
    version = pins.load(layout.pins).vllm.version
    rows: list[dict[str, object]] = []
    for name in recipes.names(layout):
        try:
            recipe = recipes.load(layout, name, version=version)
        except SettingsError as exc:
            rows.append({"name": name, "error": exc.message})
            if not as_json:
                console.row("FAIL", f"{name:<{NAME_WIDTH}}", exc.message)
            continue
        judged = fit.judge(recipe, free, device=device, environment=running.variables(layout, settings, stack=None, recipe=recipe.environment))
        there = weights.found(layout, settings, recipe)
        place = f"on disk: {there}" if there else f"to be fetched, {recipe.fetch_gib:.1f} GiB" if recipe.fetch_gib else "made at its first start"
        if not as_json:
            remote = "; runs code of the model's authors (trust-remote-code)" if recipe.asks_for_remote_code else ""
            hint = f"; {judged.hint}" if judged.hint and "serve.list" not in judged.hint else ""
            text = f"fits {_DEVICES[device]}: {judged.verdict}; needs {judged.needs_gib:.1f} GiB, free {free.available_gib:.1f}; {place}{remote}"
            console.row(_STATES[judged.verdict], f"{name:<{NAME_WIDTH}}", text + hint)
        rows.append(
            {
                "name": name,
                "model": recipe.model,
                "summary": recipe.summary,
                "fits": judged.verdict,
                "needs_gib": round(judged.needs_gib, 2),
                "takes_gib": round(judged.takes_gib, 2),
                "on_disk": str(there) if there else None,
                "fetch_gib": recipe.fetch_gib,
                "hint": judged.hint,
            }
        )
    if as_json:
        memory = {"total_gib": round(free.total_gib, 2), "available_gib": round(free.available_gib, 2), "droppable_gib": round(free.droppable_gib, 2)}
        console.data(json.dumps({"schema": 1, "device": device, "memory": memory, "rows": rows}, indent=1))
