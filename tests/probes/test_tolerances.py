"""The tolerances of the numeric probes: each holds for the device and the machines on which it was
measured.
"""

import re
import sys
from pathlib import Path

import pytest

from tests.probes.conftest import load

LIBRARY = Path(__file__).resolve().parents[2] / "workspace"

# In roundings of float32: what one per cent is, and the most that was measured for silu_and_mul on
# x86-64 and on an emulated aarch64.
ONE_PER_CENT, EXACT, COARSE = 84_000.0, 2.2, 238.0


class Anything:
    """A stand-in for torch and its tensors: all that a probe asks of it is another one."""

    def __getattr__(self, name: str) -> "Anything":
        return self

    def __call__(self, *args: object, **kwargs: object) -> "Anything":
        return self

    __getitem__ = __mul__ = __call__


@pytest.mark.parametrize(
    ("device", "machine", "least"),
    [("cpu", "x86_64", EXACT), ("cpu", "aarch64", COARSE), ("cuda", "aarch64", EXACT)],
)
def test_coarse_exp_of_arm_processors_is_allowed_there_and_in_one_operator_only(
    device: str, machine: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = load("kernels")
    for name in ("torch", "torch.nn"):
        monkeypatch.setitem(sys.modules, name, Anything())  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "drawn", Anything())
    monkeypatch.setattr(kernels.platform, "machine", lambda: machine)
    monkeypatch.setattr(
        kernels,
        "rounded",
        lambda name, found, expected, dtype, limits=kernels.ROUNDINGS: (name, 0.0, limits[dtype]),
    )
    limits = {name: limit for name, _, limit in kernels.activation(None, device)}
    coarse = [name for name in limits if "silu_and_mul" in name and name.endswith("float32")]
    allowed = {limits.pop(name) for name in coarse}
    assert all(least < limit < ONE_PER_CENT / 10 for limit in allowed)
    assert (max(allowed) > COARSE) == (least == COARSE)
    # bfloat16 is coarser than that exp, and the other operators do not use it.
    assert set(limits.values()) == set(kernels.ROUNDINGS.values())


def test_layer_that_uses_that_exp_has_the_same_limit_there() -> None:
    layers, arm = load("layers"), load("kernels").SILU_ROUNDINGS["cpu aarch64"]
    assert layers.roundings("cpu", "aarch64") == layers.ROUNDINGS | {"mlp": arm["float32"]}
    for device, machine in (("cpu", "x86_64"), ("cuda", "aarch64")):
        assert layers.roundings(device, machine) == layers.ROUNDINGS
    # A form that is left out must show beyond every limit.
    assert max(layers.ARM_CPU_ROUNDINGS.values()) * layers.SHOWN < ONE_PER_CENT


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("checks/numeric.py", "MAX_DIFFERENCE"),
        ("checks/numeric.py", "_LIMITS"),
        ("checks/numeric.py", "MAX_MEAN_BFLOAT16"),
        ("probes/engine.py", "ROUNDED"),
        ("probes/kernels.py", "ROUNDINGS"),
        ("probes/kernels.py", "SILU_ROUNDINGS"),
        ("probes/layers.py", "ROUNDINGS"),
        ("probes/layers.py", "ARM_CPU_ROUNDINGS"),
        ("probes/triton_kernel.py", "TOLERANCE"),
    ],
)
def test_tolerance_states_the_architectures_on_which_it_was_measured(
    module: str, name: str
) -> None:
    text = (LIBRARY / module).read_text()
    (reason,) = re.findall(rf"((?:^#.*\n)+){name} = ", text, re.MULTILINE)
    assert re.search("x86-64|aarch64|Arm CPU|H200", reason)
