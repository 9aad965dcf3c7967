"""Device code of libraries, and whether it serves a GPU. The fat binaries are nvcc 13.0's own, of a
kernel of one line.
"""

import functools
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from workspace.compile import device_code
from workspace.compile.device_code import Cubins, judge, judge_not_built, list_cubins
from workspace.core.paths import Layout

FATBINS = Path(__file__).parent / "fatbins"
KERNELS = "vllm/_C_stable_libtorch.abi3.so"
# As listed by cuobjdump, which omits the letters.
MULTI = ("sm_80", "sm_90a", "sm_100f", "sm_120f", "ptx 8.0", "ptx 12.0f")
RELEASE = (
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_90a",
    "sm_100",
    "sm_100f",
    "sm_120",
    "sm_120f",
    "ptx 8.0",
    "ptx 8.9",
    "ptx 9.0",
)
# Messages of vLLM 0.31.0's CMake for 12.1a with CUDA 13.0.
SPARK = (
    "Not building Machete kernels as no compatible archs found in CUDA target architectures",
    "Not building scaled_mm_c3x_sm90 as no compatible archs found in CUDA target architectures",
    "Not building scaled_mm_c3x_100 as no compatible archs found in CUDA target architectures",
    "Not building grouped_mm_c3x as no compatible archs found in CUDA target architectures.",
    "Not building grouped_mm_c3x as no compatible archs found in CUDA target architectures.",
    "Not building SM10x/11x NVFP4/MXFP4 as no compatible archs were found.",
    "Not building W4A8 kernels as no compatible archs found in CUDA target architectures",
    "Not building CUTLASS MLA as no compatible archs were found.",
    "FlashMLA will not compile: unsupported CUDA architecture 12.0",
    "DeepSelect will not compile: unsupported CUDA architecture 12.0",
)


# The linker's own file with room for fat binaries; compiled once, because that takes longer than
# all tests.
ROOM = 1 << 16
SOURCE = (
    'void *nothing(void) { return 0; }\n__asm__(".section .nv_fatbin, \\"a\\"\\n.balign'
    f' 8\\n.fill {ROOM}, 1, 0x5a\\n.text\\n");\n'
)


@functools.cache
def linked(source: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", f"{folder}/x.so"],
            input=source,
            text=True,
            check=True,
        )
        return Path(folder, "x.so").read_bytes()


def library(path: Path, section: Path | bytes | None) -> Path:
    """Return a shared library with a section of fat binaries, or without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if section is None:
        path.write_bytes(linked("void *nothing(void) { return 0; }\n"))
        return path
    held = section.read_bytes() if isinstance(section, Path) else section
    content = linked(SOURCE)
    at = content.index(b"\x5a" * ROOM)
    # Offset and size are adjacent in the header of a section (elf(5)).
    was, now = struct.pack("<QQ", at, ROOM), struct.pack("<QQ", at, len(held))
    assert content.count(was) == 1
    path.write_bytes((content[:at] + held + content[at + len(held) :]).replace(was, now))
    return path


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("sm_120", ("sm_120",)),
        ("sm_120f", ("sm_120f",)),
        ("sm_120a", ("sm_120a",)),
        ("sm_121", ("sm_121",)),
        ("sm_121a", ("sm_121a",)),
        ("multi", MULTI),
    ],
)
def test_family_single_gpu_and_plain_code_are_distinguished(
    tmp_path: Path, name: str, held: tuple[str, ...]
) -> None:
    assert device_code.architectures(library(tmp_path / "x.so", FATBINS / f"{name}.fatbin")) == held


def test_several_containers_with_zeros_between_them_are_read_to_the_last(tmp_path: Path) -> None:
    parts = [(FATBINS / f"{name}.fatbin").read_bytes() for name in ("sm_120", "sm_121a")]
    assert device_code.architectures(
        library(tmp_path / "x.so", parts[0] + bytes(24) + parts[1])
    ) == ("sm_120", "sm_121a")


def test_host_library_holds_nothing(tmp_path: Path) -> None:
    assert device_code.architectures(library(tmp_path / "x.so", None)) == ()


WHOLE = (FATBINS / "sm_120f.fatbin").read_bytes()


@pytest.mark.parametrize(
    "section",
    [
        b"\x01" + WHOLE[1:],
        WHOLE[:4] + b"\x02" + WHOLE[5:],
        WHOLE + b"more of it",
        WHOLE[:8] + struct.pack("<Q", len(WHOLE)) + WHOLE[16:],
        WHOLE[:-8],
        WHOLE[:20] + struct.pack("<I", 8) + WHOLE[24:],
        WHOLE[:44] + struct.pack("<I", 70000) + WHOLE[48:],
        WHOLE[:56] + struct.pack("<Q", 0x300000) + WHOLE[64:],
    ],
    ids=[
        "magic",
        "version",
        "rest",
        "too long",
        "cut",
        "header of 8 bytes",
        "architecture",
        "both letters",
    ],
)
def test_container_of_another_form_is_unknown_and_not_misread(
    tmp_path: Path, section: bytes
) -> None:
    with pytest.raises(device_code.UnknownForm):
        device_code.architectures(library(tmp_path / "x.so", section))


@pytest.mark.parametrize("cut", [0, 3, 63, 64, 4000, -1, -700])
def test_cut_or_foreign_file_is_unknown(tmp_path: Path, cut: int) -> None:
    path = library(tmp_path / "x.so", FATBINS / "multi.fatbin")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(device_code.UnknownForm):
        device_code.architectures(path)


def test_text_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_text("#!/bin/sh\n" * 20)
    with pytest.raises(device_code.UnknownForm):
        device_code.architectures(tmp_path / "x.so")


def listed(root: Path, paths: list[Path]) -> tuple[Cubins, ...]:
    return list_cubins(Layout(root), paths)


def test_libraries_are_named_below_the_tree(tmp_path: Path) -> None:
    path = library(Layout(tmp_path).vllm / KERNELS, FATBINS / "sm_120f.fatbin")
    assert listed(tmp_path, [path]) == (Cubins(KERNELS, ("sm_120f",), units=(("sm_120f",),) * 2),)


def containers(*units: tuple[str, ...]) -> bytes:
    """Return fat binaries with these entries and no code: only headers are read."""
    found = b""
    for unit in units:
        entries = b""
        for name in unit:
            is_ptx, suffix = name.startswith("ptx"), name[-1] if name[-1] in "af" else ""
            number = int("".join(filter(str.isdigit, name)))
            flags = {"": 0, "a": 0x100000, "f": 0x200000}[suffix]
            head = struct.pack("<HHIQ", 1 if is_ptx else 2, 0x101, 64, 0)
            entries += head + bytes(12) + struct.pack("<I", number) + bytes(8)
            entries += struct.pack("<Q", flags) + bytes(16)
        found += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    return found


# All units of three libraries in the CUDA wheel of vLLM 0.31.0 for x86-64, as this reader found
# them; MOE is _moe_C_stable_libtorch.
FA2 = (("sm_80", "ptx 8.0"),) * 76
FA3 = (("sm_90a",),) * 192
MOE = (
    *((("sm_80", "sm_120f", "ptx 8.0"),) * 14),
    *((("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),) * 7),
    *((("sm_75",),) * 7),
    *((("sm_89", "sm_120f"),) * 5),
    ("sm_75", "sm_80", "ptx 8.0"),
)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ("7.5", ""),
        ("8.0", ""),
        ("8.6", ""),
        ("8.9", ""),
        ("9.0", "_vllm_fa2_C (76 of 76 units for 9.0), _moe_C (15 of 34 units for 9.0)"),
        ("12.1", "_vllm_fa2_C (76 of 76 units for 12.1), _moe_C (1 of 34 units for 12.1)"),
    ],
)
def test_driver_compiles_the_units_of_which_only_ptx_serves_the_gpu(
    tmp_path: Path, capability: str, expected: str
) -> None:
    """On the wheel itself the reader also finds units of _C_stable_libtorch: 12 of 115 for 9.0,
    20 for 10.0, 10.3 and 11.0, 6 for 12.0 and 12.1; none for 7.5, 8.0, 8.6 and 8.9.
    """
    libraries = {"_vllm_fa2_C": FA2, "_vllm_fa3_C": FA3, "_moe_C": MOE}
    paths = [
        library(tmp_path / f"{name}.abi3.so", containers(*units))
        for name, units in libraries.items()
    ]
    found = listed(tmp_path, paths)
    assert [one.units for one in found] == list(libraries.values())
    assert device_code.driver_work(found, [capability]) == expected


def test_unit_without_any_code_for_the_gpu_is_not_compiled_by_the_driver() -> None:
    held = (("sm_90a",), ("ptx 9.0a",), ("ptx 12.0",), ("ptx 8.0",))
    found = Cubins(KERNELS, tuple(dict.fromkeys(one for unit in held for one in unit)), units=held)
    assert device_code.driver_units(found, "10.0") == 1
    assert device_code.driver_units(Cubins(KERNELS, ("ptx 12.0",)), "9.0") == 0
    assert judge([found], capabilities=["7.0"], archs="")[0].state != "ok"


def test_driver_work_is_part_of_the_verdict() -> None:
    found = Cubins("vllm/_vllm_fa2_C.abi3.so", ("sm_80", "ptx 8.0"), units=FA2)
    (verdict,) = judge([found], capabilities=["8.6", "12.1"], archs="")
    assert verdict.sentence.endswith("the driver compiles PTX for 12.1 (76 of 76 units)")


def test_unknown_form_is_reported(tmp_path: Path) -> None:
    path = library(tmp_path / "x.so", b"\x01" + WHOLE[1:])
    (found,) = listed(tmp_path, [path])
    assert found.archs == ()
    assert "cannot be read" in (found.trouble or "")
    assert judge([found], capabilities=["12.1"], archs="")[0].state == "wrong"


def test_missing_library_is_reported(tmp_path: Path) -> None:
    (found,) = listed(tmp_path, [tmp_path / "gone.so"])
    assert "No such file" in (found.trouble or "")


@pytest.mark.parametrize(
    ("held", "state"),
    [
        (("sm_120f",), "ok"),
        (("sm_121",), "ok"),
        (("sm_121a",), "ok"),
        (("sm_120",), "ok"),
        (("sm_120a",), "wrong"),
        # CUDA 12.9 and a list of 12.0: what CUTLASS compiles is for 12.0 alone
        # (vllm-project/vllm#43367), all else for its family.
        (("sm_120", "sm_120a"), "wrong"),
        (("sm_120a", "sm_121a"), "ok"),
        (("sm_120a", "sm_120f"), "ok"),
        (("sm_90a",), "wrong"),
        (("sm_100f",), "wrong"),
        (("sm_122",), "wrong"),
        (("sm_80", "ptx 8.0"), "ok"),
        (("ptx 9.0a",), "wrong"),
        (("sm_80",), "wrong"),
        (MULTI, "ok"),
        (RELEASE, "ok"),
        ((), "wrong"),
    ],
)
def test_kernels_of_a_gb10(held: tuple[str, ...], state: str) -> None:
    assert [
        one.state for one in judge([Cubins(KERNELS, held)], capabilities=["12.1"], archs="")
    ] == [state]
    assert [
        one.state for one in judge([Cubins(KERNELS, held)], capabilities=[], archs="12.1a")
    ] == [state]


@pytest.mark.parametrize(
    ("name", "held", "capability", "state"),
    [
        ("vllm/spinloop.abi3.so", (), "12.1", "idle"),
        ("vllm/fs_io_C.abi3.so", (), "12.1", "idle"),
        ("vllm/cumem_allocator.abi3.so", (), "12.1", "idle"),
        ("vllm/third_party/deep_gemm/_C.cpython-312-aarch64-linux-gnu.so", (), "12.1", "idle"),
        ("vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", ("sm_90a",), "12.1", "idle"),
        ("vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", (), "9.0", "wrong"),
        ("vllm/_flashmla_C.abi3.so", ("sm_90a", "sm_100f"), "12.1", "idle"),
        ("vllm/_flashkda_C.abi3.so", ("sm_90a", "sm_100f"), "12.1", "wrong"),
        # The release wheels take one family for QuTLASS, and it is not a Spark's.
        ("vllm/_qutlass_C.abi3.so", ("sm_100f",), "12.1", "idle"),
        ("vllm/_qutlass_C.abi3.so", (), "12.1", "wrong"),
        ("vllm/_new_C.abi3.so", (), "12.1", "idle"),
        ("vllm/_new_C.abi3.so", ("sm_90a",), "12.1", "wrong"),
        ("vllm/_vllm_fa2_C.abi3.so", ("sm_80", "ptx 8.0"), "12.1", "ok"),
    ],
)
def test_library_is_judged_by_what_upstream_has_for_it(
    name: str, held: tuple[str, ...], capability: str, state: str
) -> None:
    assert judge([Cubins(name, held)], capabilities=[capability], archs="9.0")[0].state == state


def test_every_gpu_must_be_served() -> None:
    (output,) = judge([Cubins(KERNELS, ("sm_120f",))], capabilities=["12.1", "9.0"], archs="")
    assert (output.state, output.sentence) == (
        "wrong",
        "holds sm_120f, of which nothing runs on 9.0",
    )


def test_without_gpu_and_list_only_an_empty_library_is_wrong() -> None:
    assert [
        one.state
        for one in judge(
            [Cubins(KERNELS, ("sm_75",)), Cubins(KERNELS, ())], capabilities=[], archs=""
        )
    ] == ["ok", "wrong"]


def test_sentences_of_a_spark_are_all_expected() -> None:
    output = judge_not_built([f"-- {sentence}" for sentence in SPARK], "12.1a")
    assert (output.failures, output.unknown, len(output.expected)) == ((), (), len(set(SPARK)))


@pytest.mark.parametrize(
    ("sentence", "archs", "part"),
    [
        (
            (
                "Not building scaled_mm_c3x_120 as no compatible archs found in CUDA target"
                " architectures"
            ),
            "12.1a",
            "failures",
        ),
        ("Not building SM12x NVFP4 as no compatible archs were found.", "12.1a", "failures"),
        ("Not building SM12x NVFP4 as no compatible archs were found.", "9.0", "expected"),
        (
            "Not building Marlin kernels as no compatible archs found in CUDA target architectures",
            "12.1",
            "failures",
        ),
        (
            (
                "Not building Marlin MOE kernels as no compatible archs found in CUDA target"
                " architectures"
            ),
            "12.1",
            "failures",
        ),
        (
            "Not building moe_data as no compatible archs found in CUDA target architectures.",
            "12.1",
            "failures",
        ),
        (
            "Not building moe_data as no compatible archs found in CUDA target architectures.",
            "8.9",
            "expected",
        ),
        (
            (
                "Not building Machete kernels as no compatible archs found in CUDA target"
                " architectures"
            ),
            "12.1;9.0",
            "failures",
        ),
        (
            (
                "Not building AllSpark kernels as no compatible archs found in CUDA target"
                " architectures"
            ),
            "12.1a",
            "expected",
        ),
        (
            (
                "Not building scaled_mm_c2x as all archs are already built for and covered by"
                " scaled_mm_c3x"
            ),
            "9.0",
            "expected",
        ),
        (
            (
                "Not building scaled_mm_c3x_sm120 as CUDA Compiler version is not >= 12.8, we"
                " recommend upgrading"
            ),
            "12.1",
            "failures",
        ),
        (
            (
                "[QUTLASS] Skipping build: no supported arch (12.0f / 10.0f) found in"
                " CUDA_ARCHS='9.0'."
            ),
            "9.0",
            "expected",
        ),
        (
            "[QUTLASS] Skipping build: CUDA 12.8 or newer is required (found 12.6).",
            "12.1",
            "failures",
        ),
        ("Not building warp_drive as no compatible archs found", "12.1a", "unknown"),
        (
            (
                "Not building Machete kernels as no compatible archs found in CUDA target"
                " architectures"
            ),
            "",
            "unknown",
        ),
    ],
)
def test_sentence_is_judged_by_the_list_of_architectures(
    sentence: str, archs: str, part: str
) -> None:
    output = judge_not_built([sentence], archs)
    (quoted,) = getattr(output, part)
    assert quoted.startswith(sentence)
    assert sum(map(len, (output.expected, output.failures, output.unknown))) == 1


def test_message_of_two_blocks_fails_if_printed_more_often_than_expected() -> None:
    sentence = (
        "Not building grouped_mm_c3x as no compatible archs found in CUDA target architectures."
    )
    assert judge_not_built([sentence], "9.0").failures == ()
    assert len(judge_not_built([sentence, sentence], "9.0").failures) == 1
    assert judge_not_built([sentence, sentence], "12.1").failures == ()
