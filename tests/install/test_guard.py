"""Whether libraries of a wheel may be mixed with local ones: small real wheels with faults."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compile.trees import put
from workspace.core import settings
from workspace.core.paths import Layout
from workspace.install import precompiled

ROOT = Path(__file__).resolve().parents[2]
METADATA = """\
Metadata-Version: 2.4
Name: vllm
Version: 0.31.0
Requires-Dist: regex
Requires-Dist: torch==2.13.0
Requires-Dist: nvidia-cutlass-dsl[cu13]==4.7.1
Requires-Dist: other[cu12]>=1; extra == "other"

torch==9.9.9 is a line of the description.
"""
LIBRARIES = ("vllm/_C_stable_libtorch.abi3.so", "vllm/spinloop.abi3.so", "vllm/vllm-rs")
RELEASED = {"variable": {"TORCH_CUDA_ARCH_LIST": {"default": "7.5 8.0 9.0 12.0"}}}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A workspace that pins 0.31.0, with a tree that lists the architectures of releases."""
    layout = Layout(tmp_path / "clone")
    layout.pins.parent.mkdir(parents=True)
    shutil.copy(ROOT / "vendor" / "pins.toml", layout.pins)
    text = layout.pins.read_text()
    version = text.split('version = "', 1)[1].split('"', 1)[0]
    layout.pins.write_text(
        text.replace(f'"v{version}"', '"v0.31.0"').replace(
            f'version = "{version}"', 'version = "0.31.0"'
        )
    )
    put(layout.vllm, {"docker/versions.json": json.dumps(RELEASED)})
    return layout


Ask = Callable[..., str | None]


@pytest.fixture
def ask(layout: Layout) -> Ask:
    def ask(
        wheel: Path, *, device: str = "cuda", torch: str = "2.13.0+cu130", archs: str = "12.1a"
    ) -> str | None:
        return precompiled.why_not_hybrid(
            layout,
            settings.load(layout, environ={}),
            wheel,
            device=device,
            torch=torch,
            archs=archs,
        )

    return ask


def make(
    folder: Path,
    *,
    metadata: str = METADATA,
    libraries: tuple[str, ...] = LIBRARIES,
    name: str = "vllm-0.31.0-py3-none-any.whl",
) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for library in libraries:
            archive.writestr(library, b"\x7fELF" + bytes(2000))
        archive.writestr("vllm/vendored.dist-info/METADATA", "Metadata-Version: 1.0\nVersion: 9\n")
        archive.writestr("vllm-0.31.0.dist-info/METADATA", metadata)
    return path


def test_the_pins_own_wheel_goes_with_the_torch_that_it_names(tmp_path: Path, ask: Ask) -> None:
    wheel = make(tmp_path)
    assert ask(wheel) is None
    assert ask(wheel, torch="2.13.1") is None
    assert ask(wheel, archs="9.0a;12.0") is None


def test_metadata_alone_is_enough(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "METADATA").write_text(METADATA)
    assert ask(tmp_path / "METADATA") is None


def test_another_tag_is_refused(tmp_path: Path, ask: Ask) -> None:
    assert (
        ask(make(tmp_path, metadata=METADATA.replace("0.31.0", "0.30.0")))
        == "the precompiled wheel is vLLM 0.30.0, not the pinned 0.31.0"
    )


@pytest.mark.parametrize("torch", ["2.14.0+cu130", "2.13.0a0+nv25.10", "2.12.0+cu130"])
def test_another_torch_is_refused(tmp_path: Path, ask: Ask, torch: str) -> None:
    assert (
        ask(make(tmp_path), torch=torch)
        == f"the precompiled wheel was built for torch 2.13.0 and {torch} is installed"
    )


def test_another_major_version_of_cuda_is_refused_and_the_cpu_has_none(
    tmp_path: Path, ask: Ask
) -> None:
    output = (
        "the precompiled wheel is linked against CUDA 13, the installed torch 2.13.0+cu129 against"
        " CUDA 12"
    )
    assert ask(make(tmp_path), torch="2.13.0+cu129") == output
    assert ask(make(tmp_path), torch="2.13.0+cu129", device="cpu", archs="") is None
    local = make(
        tmp_path,
        metadata=METADATA.replace("Version: 0.31.0", "Version: 0.31.0+cu129"),
        name="local.whl",
    )
    assert ask(local, torch="2.13.0+cu129") is None


def test_an_architecture_of_a_family_that_releases_lack_is_refused(
    tmp_path: Path, layout: Layout, ask: Ask
) -> None:
    assert (
        ask(make(tmp_path), archs="10.0 12.1")
        == "releases have kernels for 7.5, 8.0, 9.0, 12.0, none for the family of 10.0"
        " (TORCH_CUDA_ARCH_LIST)"
    )
    (layout.vllm / "docker/versions.json").write_text("[]")
    assert ask(make(tmp_path), archs="10.0 12.1") is None


MARKED = METADATA.replace(
    "torch==2.13.0\n",
    'torch==2.13.0; platform_system == "Linux"\nRequires-Dist: torch==2.9.0; platform_system =='
    ' "Darwin"\n',
    1,
)


def test_of_several_torches_that_of_this_machine_counts(tmp_path: Path, ask: Ask) -> None:
    assert ask(make(tmp_path, metadata=MARKED)) is None


@pytest.mark.parametrize(
    ("metadata", "output"),
    [
        (
            METADATA.replace("torch==2.13.0\n", "torch>=2\n", 1),
            "names no torch that it was built for",
        ),
        (
            METADATA.replace("torch==2.13.0\n", "torch==2.*\n", 1),
            "names no torch that it was built for",
        ),
        (
            METADATA.replace("torch==2.13.0\n", 'torch==2.13.0; extra == "x"\n', 1),
            "names no torch that it was built for",
        ),
        (
            METADATA.replace("Requires-Dist: regex", "Requires-Dist: @@@"),
            "has METADATA that is not of a wheel",
        ),
        (
            METADATA.replace("Version: 0.31.0", "Version: new"),
            "has METADATA that is not of a wheel",
        ),
        ("", "has METADATA that is not of a wheel"),
        ("\0\xff" * 10, "has METADATA that is not of a wheel"),
        ("x" * 2_000_000, "holds METADATA that is not of a wheel"),
    ],
)
def test_metadata_without_facts_is_a_sentence(
    tmp_path: Path, ask: Ask, metadata: str, output: str
) -> None:
    found = ask(make(tmp_path, metadata=metadata))
    assert found is not None
    assert found.startswith(f"the precompiled wheel vllm-0.31.0-py3-none-any.whl {output}")


def spoiled(folder: Path, how: str) -> Path:
    wheel = make(folder)
    content = wheel.read_bytes()
    match how:
        case "gone":
            wheel.unlink()
        case "a folder":
            wheel.unlink()
            wheel.mkdir()
        case "empty":
            wheel.write_bytes(b"")
        case "cut":
            wheel.write_bytes(content[: len(content) // 2])
        case "not METADATA":
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("vllm/_C.abi3.so", b"")
        case "bytes turned":
            at = content.index(b"vllm-0.31.0.dist-info/METADATA") + 40
            wheel.write_bytes(
                content[:at]
                + bytes(byte ^ 0x55 for byte in content[at : at + 60])
                + content[at + 60 :]
            )
        case "encrypted":
            # Bit 0 of the flags of each central entry (APPNOTE.TXT, 4.4.4).
            wheel.write_bytes(
                content.replace(
                    b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
                )
            )
        case "a directory that lies":
            wheel.write_bytes(
                content.replace(
                    b"vllm-0.31.0.dist-info/METADATA", b"vllm-0.31.0.dist-info/METADAT\xff"
                )
            )
    return wheel


@pytest.mark.parametrize(
    "how",
    [
        "gone",
        "a folder",
        "empty",
        "cut",
        "not METADATA",
        "bytes turned",
        "encrypted",
        "a directory that lies",
    ],
)
def test_a_wheel_that_is_spoiled_is_a_sentence_and_no_traceback(
    tmp_path: Path, ask: Ask, how: str
) -> None:
    output = ask(spoiled(tmp_path, how))
    assert output is not None
    assert output.startswith("the precompiled wheel vllm-0.31.0-py3-none-any.whl ")
    assert "\n" not in output


def test_a_torch_that_is_no_version_and_pins_that_are_none_are_sentences(
    tmp_path: Path, layout: Layout, ask: Ask
) -> None:
    assert (
        ask(make(tmp_path), torch="mine") == "the version of the installed torch is not valid: mine"
    )
    layout.pins.write_text("[")
    output = ask(make(tmp_path))
    assert output is not None
    assert output.startswith("vendor/pins.toml: Invalid ")
