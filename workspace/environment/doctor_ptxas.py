"""The doctor's check of Triton's assemblers: each is given a few lines of PTX for the GPU of this machine."""

from collections.abc import Iterator

from workspace.environment import triton
from workspace.environment.assemblers import USUAL_CAPABILITY, Assembler, Verdict, attempt, judge, of_triton, target_of
from workspace.environment.doctor_case import Case, Row, State, key


def ptxas(case: Case) -> Iterator[Row]:
    """Check both of Triton's assemblers by assembling for the GPU of this machine, or a Spark's where there is none."""
    there = triton.observe(case.layout)
    if case.device == "cpu":
        yield Row("ok", "ptxas", "not asked for: the device is cpu", "Triton assembles its kernels with it")
    elif there is None:
        yield Row("ok", "ptxas", "no Triton in .vllm yet", "Triton assembles its kernels with it")
    elif there.bin is None:
        yield Row("FAIL", "ptxas", f"Triton {there.version} without triton/backends/nvidia/bin", "Triton cannot assemble a kernel", "./scripts/inv fix-triton")
    else:
        capability = capability_of(case)
        for one in of_triton(there.bin, there.version, capability):
            yield _row(case, judge(one, case.settings, capability, case.ask), there.version, capability)


def capability_of(case: Case) -> str:
    """The capability that kernels are for: the first GPU's, or a Spark's where there is none."""
    return next((gpu.capability for gpu in case.host().gpus if gpu.capability and key(gpu.capability)), USUAL_CAPABILITY)


def _row(case: Case, verdict: Verdict, version: str, capability: str) -> Row:
    one, own, trial = verdict.assembler, verdict.own, verdict.trial
    target, _ = target_of(capability)
    why = f"Triton {version} assembles kernels for {target} with it"
    if verdict.is_refused:
        return Row("FAIL", one.name, f"{one.variable}={own} is no program that may be run", "Triton stops there with a PermissionError", _unset(case, one))
    ignored = f"{one.variable}={own} does not run and is passed over; " if verdict.is_ignored else ""
    if trial is None:
        state: State = "FAIL" if one.is_used else "warn"
        cure = _cure(case, one, capability) if one.is_used else f"{case.uv} pip install --python .vllm/bin/python --no-deps --reinstall triton=={version}"
        return Row(state, one.name, f"{ignored}{case.layout.relative(one.bundled)} does not run", why, cure)
    place = "Triton's own" if trial.program == one.bundled else str(trial.program)
    seen = f"{ignored}{place}, CUDA {trial.release}, {'fails on' if trial.complaint else 'assembles'} {target}"
    if trial.complaint and one.is_used:
        return Row("FAIL", one.name, f"{seen}: {trial.complaint}", why, _cure(case, one, capability))
    unused = "" if one.is_used else "; another one is used for this GPU"
    return Row(
        "warn" if ignored else "ok",
        one.name,
        seen + unused,
        why if one.is_used else "kernels for older GPUs are assembled with it",
        _unset(case, one) if ignored else None,
    )


def _cure(case: Case, one: Assembler, capability: str) -> str:
    """Triton's own in place of one that was set, else the toolkit's, where that can do better."""
    if case.settings.path(one.variable):
        return _unset(case, one)
    found = case.toolkit()
    trial = attempt(found.home / "bin" / "ptxas", capability, case.ask) if found else None
    if found and trial and not trial.complaint:
        return f"echo {one.variable}={trial.program} >> .env"
    return f"sudo apt install cuda-toolkit-13-0 && echo {one.variable}=/usr/local/cuda-13.0/bin/ptxas >> .env"


def _unset(case: Case, one: Assembler) -> str:
    return f"unset {one.variable}" if case.settings.source(one.variable) == "shell" else f"sed -i '/^{one.variable}=/d' .env"
