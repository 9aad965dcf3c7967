"""For which architectures upstream has kernels, as data: library by library, and by the sentences of a configure.

Read in CMakeLists.txt and cmake/external_projects of v0.24.0 and v0.31.0. A letter as in cuda_archs_loose_intersection (cmake/utils.cmake):
`9.0a` that GPU alone, `12.0f` the family, `+PTX` newer ones too. Under CUDA 12 the families are spelled out with `a`, for the same GPUs.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from workspace.environment.doctor_cuda import parse, runs_on

_SM9X_UP = "9.0a;10.0f;10.7f;11.0f;12.0f"
_SM10X = "10.0f;10.7f;11.0f"


@dataclass(frozen=True)
class Gate:
    """Architectures that upstream compiles a library for, none where it has no device code of its own, and where that stands."""

    archs: str
    rule: str
    # A build for several families holds one of them.
    takes_one: bool = False

    def serves(self, capability: str) -> bool:
        return serves(self.archs, capability)


HOST = Gate("", "compiled by the host's compiler alone (CMakeLists.txt, LANGUAGE CXX)")
# By the name of the file before its first dot, the folder before it where two have the same.
LIBRARIES = {
    "spinloop": HOST,
    "fs_io_C": HOST,
    "cumem_allocator": HOST,
    "vllm-rs": Gate("", "Rust"),
    "_rust_tool_parser": Gate("", "Rust"),
    "deep_gemm/_C": Gate("", "compiles its kernels at run time (deepgemm.cmake)"),
    "_C_stable_libtorch": Gate("7.5+PTX", "CUDA_ARCHS"),
    "_moe_C_stable_libtorch": Gate("7.5+PTX", "CUDA_ARCHS"),
    "_vllm_fa2_C": Gate("8.0+PTX", "_is_fa2_supported"),
    "_vllm_fa3_C": Gate("9.0a", "_is_fa3_supported"),
    "_flashmla_C": Gate("9.0a;10.0f;10.7f", "flashmla.cmake, SUPPORT_ARCHS"),
    "_flashmla_extension_C": Gate("9.0a;10.0f;10.7f", "flashmla.cmake, SUPPORT_ARCHS"),
    "_deepselect_C": Gate("10.0f", "deepselect.cmake, DEEPSELECT_SUPPORT_ARCHS"),
    "_flashkda_C": Gate("9.0a;10.0f;12.0f", "flashkda.cmake, FLASH_KDA_SUPPORT_ARCHS"),
    "_qutlass_C": Gate("10.0f;10.7f;12.0f", "qutlass.cmake, QUTLASS_ARCHS: 10.0 where both are asked for, as in the release wheels", takes_one=True),
}


@dataclass(frozen=True)
class Rule:
    """A sentence of configure, and the architectures of each block that may print it: it is in its place where a block serves none that is asked for."""

    pattern: str
    blocks: tuple[str, ...]
    rule: str


# `as CUDA Compiler version is not >= 12.8` is printed only where an architecture that is asked for would have had the kernels.
_TOO_OLD = re.compile(r"as CUDA Compiler version is|CUDA [0-9.]+ or newer is required")
RULES = (
    Rule(r"Not building Machete kernels as no", ("9.0a",), "MACHETE_ARCHS"),
    Rule(r"Not building Marlin kernels as no", ("7.5;8.0+PTX",), "MARLIN_OTHER_ARCHS"),
    Rule(r"Not building Marlin MOE kernels as no", ("7.5;8.0+PTX",), "MARLIN_MOE_OTHER_ARCHS"),
    Rule(r"Not building AllSpark kernels as no", ("8.0;8.6;8.7;8.9",), "ALLSPARK_ARCHS"),
    Rule(r"Not building dsv3_fused_a_gemm as no", (_SM9X_UP,), "DSV3_FUSED_A_GEMM_ARCHS"),
    Rule(r"Not building (fp32_router_gemm|DSV3 router GEMM kernels) as no", (_SM9X_UP,), "cuda_archs_sm90plus"),
    Rule(r"Not building scaled_mm_c3x_(sm)?90 as no", ("9.0a",), "SCALED_MM_ARCHS"),
    Rule(r"Not building scaled_mm_c3x_(sm)?100 as no", (_SM10X,), "SCALED_MM_ARCHS"),
    Rule(r"Not building scaled_mm_c3x_(sm)?120 as no", ("12.0f",), "SCALED_MM_ARCHS"),
    Rule(r"Not building scaled_mm_c2x as all archs are already built", ("",), "SCALED_MM_3X_ARCHS"),
    Rule(r"Not building scaled_mm_c2x as no", ("7.5;8.0;8.7;8.9+PTX",), "SCALED_MM_2X_ARCHS"),
    # Two blocks print the same words.
    Rule(r"Not building grouped_mm_c3x as no", ("9.0a", _SM10X), "SCALED_MM_ARCHS of CUTLASS MoE, SM90 and SM100"),
    Rule(r"Not building moe_data as no", (_SM9X_UP,), "CUTLASS_MOE_DATA_ARCHS"),
    Rule(r"Not building SM12x NVFP4 as no", ("12.0f",), "FP4_SM120_ARCHS"),
    Rule(r"Not building SM10x/11x NVFP4/MXFP4 as no", (_SM10X,), "FP4_SM100_ARCHS"),
    Rule(r"Not building W4A8 kernels as no", ("9.0a",), "W4A8_ARCHS"),
    Rule(r"Not building CUTLASS MLA as no", (_SM10X,), "MLA_ARCHS"),
    Rule(r"FlashMLA will not compile", (LIBRARIES["_flashmla_C"].archs,), LIBRARIES["_flashmla_C"].rule),
    Rule(r"DeepSelect will not compile", (LIBRARIES["_deepselect_C"].archs,), LIBRARIES["_deepselect_C"].rule),
    Rule(r"FlashKDA will not compile", (LIBRARIES["_flashkda_C"].archs,), LIBRARIES["_flashkda_C"].rule),
    Rule(r"DeepGEMM will not compile", ("9.0a;10.0f;10.7f;12.0f",), "deepgemm.cmake, DEEPGEMM_SUPPORT_ARCHS"),
    Rule(r"\[QUTLASS\] Skipping build: no supported arch", (LIBRARIES["_qutlass_C"].archs,), "qutlass.cmake, QUTLASS_ARCHS"),
)


@dataclass(frozen=True)
class NotBuilt:
    """What configure leaves out: rightly, wrongly, or for a reason that is not known here. Each is a sentence that quotes configure's."""

    expected: tuple[str, ...]
    failures: tuple[str, ...]
    unknown: tuple[str, ...]


def serves(archs: str, capability: str) -> bool:
    return any(runs_on(entry, capability) for entry in parse(archs))


def judge_not_built(sentences: Sequence[str], archs: str) -> NotBuilt:
    """Judge configure's sentences on kernels that it leaves out, by the architecture list it was given. Of an empty list nothing is known."""
    wanted = tuple(entry.number for entry in parse(archs))
    expected, failures, unknown = [], [], []
    for sentence, count in Counter(sentence.strip().removeprefix("-- ") for sentence in sentences).items():
        rule = next((rule for rule in RULES if re.match(rule.pattern, sentence)), None)
        if _TOO_OLD.search(sentence):
            failures.append(f"{sentence}: the toolkit is too old for {archs}")
        elif rule is None or not wanted:
            unknown.append(f"{sentence}: not known here, so it may be right or wrong for {archs or 'no architecture list'}")
        else:
            serving = [block for block in rule.blocks if any(serves(block, capability) for capability in wanted)]
            if count <= len(rule.blocks) - len(serving):
                expected.append(f"{sentence}: {' or '.join(block for block in rule.blocks if block not in serving) or 'covered'} ({rule.rule})")
            else:
                failures.append(f"{sentence}: upstream has them for {' and '.join(serving)}, which {archs} asks for ({rule.rule})")
    return NotBuilt(tuple(expected), tuple(failures), tuple(unknown))
