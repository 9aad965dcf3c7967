"""The record of one run of upstream's tests: the document of the smoke (smoke/record.py), a check for each test file, and what of it is special."""

from workspace.build import plan
from workspace.environment.machine import Machine
from workspace.smoke import record
from workspace.upstream.suite import Result, Selection


def compose(result: Result, selection: Selection, observed: plan.Observation, *, tree: record.Tree, machine: Machine, seconds: float) -> dict[str, object]:
    """Put the record together. Where no test came to an end, as without a GPU, its verdict is `skipped`."""
    built, torch = observed.kernels.recorded, observed.torch
    versions = {
        "vllm": {"version": built.outcome.get("version") if built else None},
        "torch": {"version": torch.version, "cuda": torch.cuda} if torch else None,
        "python": observed.python.version if observed.python else None,
    }
    document = record.compose(result.checks, level="upstream", tree=tree, machine=machine, parity=versions, seconds=seconds)
    if all(check.verdict == "skipped" for check in result.checks):
        document["verdict"] = "skipped"
    found = result.found
    return document | {
        "changed": list(selection.chosen),
        "unreached": {one.path: one.why for one in selection.reach.unreached},
        "tests": {"passed": len(found.passed), "failed": len(found.own), "skipped": len(found.skipped), "hub": len(found.hub), "pin": len(found.pin)},
    }
