"""CUDA architectures and version keys: capabilities, entries of an architecture list, the targets
of an assembler, and the rules that decide which code runs on which GPU.

Everything here is text and numbers: this module starts no program and reads no file.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The capability of a GB10 (DGX Spark), assumed where no GPU answers.
USUAL_CAPABILITY = "12.1"
# The oldest capability in vLLM's CMakeLists.txt.
OLDEST_CAPABILITY = "7.5"
# The architecture of a GB10 must carry its suffix: its own instructions are not in plain 12.1.
_ARCH_WITH_SUFFIX = {"12.1": "12.1a"}
# The PTX version that introduced the architecture; an assembler that supports the version supports
# the architecture (PTX ISA, release notes).
_PTX: dict[tuple[int, ...], str] = {(10, 0): "8.6", (10, 1): "8.6", (11, 0): "9.0", (12, 0): "8.7"}
_ENTRY = re.compile(r"(?P<number>\d+\.\d+)(?P<suffix>[af]?)(?P<ptx>\+PTX)?$")
_NVCC_ARCH = re.compile(r"^compute_(\d+)[af]?$", re.MULTILINE)


def key(version: str) -> tuple[int, ...]:
    """Return a version such as 12.9 as numbers to compare; whatever is no number ends it."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


@dataclass(frozen=True)
class Entry:
    """An entry of TORCH_CUDA_ARCH_LIST.

    `number` is a capability such as 12.1, `suffix` is `a`, `f` or empty; with `has_ptx` the build
    keeps PTX for newer GPUs.
    """

    text: str
    number: str
    suffix: str
    has_ptx: bool


def parse(text: str) -> tuple[Entry, ...]:
    """Read an architecture list; settings.py has already refused a malformed one."""
    tokens = [token for token in re.split(r"[ ;,]+", text.strip(" ;,")) if token]
    return tuple(
        Entry(token, entry["number"], entry["suffix"], bool(entry["ptx"]))
        for token in tokens
        if (entry := _ENTRY.match(token))
    )


def runs_on(entry: Entry, capability: str) -> bool:
    """Decide whether kernels of an entry run on a GPU.

    Cubins run on their own major version, from their minor version on; cubins with `a` run on
    exactly their own capability; PTX is compiled for newer GPUs, but not with `a` (CUDA C++
    Programming Guide, compute capabilities and feature sets).
    """
    own, gpu = key(entry.number), key(capability)
    if entry.suffix == "a":
        return own == gpu
    return (own[0] == gpu[0] and own <= gpu) or (entry.has_ptx and not entry.suffix and own <= gpu)


def known_capabilities(reported: Iterable[str | None]) -> tuple[str, ...]:
    """Return each capability that is a number once, in the order of the GPUs."""
    return tuple(dict.fromkeys(text for text in reported if text and key(text)))


def suggest_list(capabilities: Iterable[str]) -> str:
    """Return the architecture list that compiles for GPUs of these capabilities."""
    return ";".join(_ARCH_WITH_SUFFIX.get(capability, capability) for capability in capabilities)


def fault_of(entries: Sequence[Entry], capabilities: Sequence[str]) -> str | None:
    """Return a sentence on what is wrong with an architecture list; None where it is right."""
    if not entries:
        return _fault_of_empty(capabilities)
    families = [entry.text for entry in entries if entry.suffix == "f"]
    if families:
        return f"torch.utils.cpp_extension refuses {families[0]}: Unknown CUDA arch"
    for capability in capabilities:
        if not any(runs_on(entry, capability) for entry in entries):
            listed = " and ".join(entry.text for entry in entries)
            return f"kernels for {listed} do not run on capability {capability}"
    return None


def _fault_of_empty(capabilities: Sequence[str]) -> str:
    if not capabilities or USUAL_CAPABILITY in capabilities:
        return "without a list torch's CMake turns a GB10's 12.1 into compute_20, unknown to nvcc"
    return "without a list a build compiles every architecture of vLLM and takes many times as long"


def archs_of_nvcc(listing: str) -> frozenset[str]:
    """Return the architectures in the output of `nvcc --list-gpu-arch`, such as 121."""
    return frozenset(_NVCC_ARCH.findall(listing))


def unsupported(entries: Iterable[Entry], archs: frozenset[str]) -> tuple[str, ...]:
    """Return the entries that are not among nvcc's architectures; none where nvcc lists none."""
    return tuple(
        entry.text for entry in entries if archs and entry.number.replace(".", "") not in archs
    )


def target_of(capability: str) -> tuple[str, str]:
    """Return target and PTX version for a capability.

    Triton writes the target as `sm_121a`, with the suffix from capability 9.0 on.
    """
    parts = key(capability)[:2]
    ptx = _PTX.get(parts, "8.8" if parts >= (10, 0) else "8.0")
    return f"sm_{''.join(str(part) for part in parts)}{'a' if parts >= (9, 0) else ''}", ptx
