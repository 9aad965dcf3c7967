from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from workspace.core.errors import BuildError
from workspace.machine import requirements

PYPROJECT = """
[build-system]
requires = ["cmake>=3.26.1", "torch == 2.13.0"]
[project]
requires-python = ">=3.10,<3.15"
[tool.uv]
exclude-dependencies = ["openai-harmony"]
"""
FILES = {
    "pyproject.toml": PYPROJECT,
    "requirements/common.txt": (
        "# torch is not here\nnumpy\nsix>=1.16.0; python_version > '3.11' # for 3.12\n"
        "xgrammar == 0.2.7; platform_machine == 'aarch64' or platform_machine == 'x86_64'\n"
    ),
    "requirements/build/cpu.txt": "cmake>=3.26.1\ncmake-format\ntorch==2.13.0+cpu\nwheel\n",
    "requirements/build/cuda.txt": "cmake>=3.26.1\ntorch==2.13.0\nwheel\n",
    "requirements/cpu.txt": (
        "-r common.txt\ntorch==2.13.0+cpu; platform_machine != 'riscv64'\ntorch==2.13.0;"
        " platform_machine == 'riscv64'\ntorchvision\ntorchcodec >= 0.14\ntriton @"
        ' https://example.org/triton-3.8.0+cpu-cp312-abi3-any.whl ; platform_machine == "x86_64"'
        " and python_version >= \"3.12\"\npy-cpuinfo; platform_machine == 'aarch64'\n"
    ),
    "requirements/cuda.txt": (
        "-r common.txt\n--extra-index-url https://example.org/whl/\n"
        "torch==2.13.0\ntorchaudio==2.11.0\nflashinfer-python==0.7.0\n"
        "flashinfer_cubin==0.7.0\nhumming-kernels[cu13]==0.1.16"
        " \\\n  # a remark behind a continued line\n"
    ),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return plant(tmp_path / "tree", FILES)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def read(
    tree: Path,
    *,
    device: str = "cpu",
    machine: str = "x86_64",
    python: str = "3.12.3",
    existing: bool = False,
) -> requirements.Requirements:
    return requirements.read(
        tree,
        device=device,
        machine=machine,
        python_version=python,
        use_existing_torch=existing,
    )


def test_lines_are_sorted_by_how_they_are_installed(tree):
    found = read(tree)
    assert found.torch == "torch==2.13.0+cpu"
    assert found.companions == ("torchvision", "torchcodec>=0.14")
    assert found.accelerators == ("xgrammar==0.2.7",)
    assert found.runtime == ("numpy", "six>=1.16.0")
    assert found.python == SpecifierSet(">=3.10,<3.15")


def test_cmake_is_bounded_because_triton_shares_the_environment_and_its_namesakes_are_not(tree):
    assert read(tree).build == ("cmake>=3.26.1,<4", "cmake-format", "wheel")


def test_markers_are_judged_for_the_built_python_and_not_for_the_one_that_runs_the_tools(tree):
    assert "six>=1.16.0" not in read(tree, python="3.11.7").runtime
    assert "py-cpuinfo" in read(tree, machine="aarch64").runtime
    assert read(tree, machine="riscv64").torch == "torch==2.13.0"
    assert read(tree, machine="riscv64").accelerators == ()


def test_line_that_the_index_cannot_serve_is_left_out_with_its_reason(tree):
    line, why = read(tree).left_out[0]
    assert line.startswith("triton @ https://")
    assert "address of its own" in why
    assert read(tree, machine="aarch64").left_out == ()
    assert [line for line, _ in read(tree, device="cuda").left_out] == [
        "--extra-index-url https://example.org/whl/",
        "flashinfer-cubin==0.7.0",
    ]


def test_continued_line_and_extras_are_read(tree):
    assert "humming-kernels[cu13]==0.1.16" in read(tree, device="cuda").runtime


def test_beside_a_cpu_torch_no_dependency_may_install_companions_or_triton(tree):
    names = [line.split()[0] for line in read(tree).overrides]
    assert names == ["torchvision", "torchaudio", "torchcodec", "triton", "openai-harmony"]
    assert [line.split()[0] for line in read(tree, device="cuda").overrides] == ["openai-harmony"]


def test_triton_that_the_tree_itself_takes_from_the_index_is_not_kept_out(tree):
    (tree / "requirements" / "cpu.txt").write_text(
        "torch==2.7.0+cpu\ntriton==3.2.0; platform_machine == 'x86_64'\n"
    )
    found = read(tree)
    assert found.accelerators == ("triton==3.2.0",)
    assert not any(line.startswith("triton") for line in found.overrides)


def test_existing_torch_is_kept_and_the_tree_is_not_touched(tree):
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in tree.rglob("*")
        if path.is_file()
    }
    for device in ("cpu", "cuda"):
        found = read(tree, device=device, existing=True)
        assert (found.torch, found.companions) == ("", ())
        assert "numpy" in found.runtime
        assert "torchvision" in [line.split()[0] for line in found.overrides]
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in tree.rglob("*")
        if path.is_file()
    } == before


@pytest.mark.parametrize(
    "names",
    [
        ("requirements/build.txt", "requirements/cpu.txt"),
        ("requirements-build.txt", "requirements-cpu.txt"),
    ],
)
def test_files_of_older_trees_are_found(tmp_path, names):
    build, runtime = names
    old = plant(
        tmp_path / "old",
        {
            "pyproject.toml": "[project]\nrequires-python = '>=3.9'\n",
            build: "ninja\n",
            runtime: "-r " + Path(runtime).name.replace("cpu", "common") + "\ntorch==2.7.0\n",
        },
    )
    (old / runtime.replace("cpu", "common")).write_text("psutil\n")
    found = read(old)
    assert (found.build, found.runtime, found.torch) == (("ninja",), ("psutil",), "torch==2.7.0")


def test_digest_follows_the_files_that_were_read_and_no_others(tree):
    first = read(tree).digest
    (tree / "requirements" / "cuda.txt").write_text("torch==1\n")
    assert read(tree).digest == first
    (tree / "requirements" / "common.txt").write_text("numpy<3\n")
    assert read(tree).digest != first


def test_line_that_is_no_requirement_is_an_error_with_file_and_line(tree):
    (tree / "requirements" / "common.txt").write_text("numpy\n\n<<<<<<< HEAD\nsix\n")
    with pytest.raises(
        BuildError, match=r"requirements/common\.txt, line 3: '<<<<<<< HEAD' is not a requirement"
    ):
        read(tree)


def test_tree_without_its_files_is_an_error_and_no_traceback(tree):
    (tree / "requirements" / "common.txt").unlink()
    with pytest.raises(BuildError, match=r"requirements/common\.txt of the tree cannot be read"):
        read(tree)
    with pytest.raises(BuildError, match="none of requirements/build/xpu"):
        read(tree, device="xpu")
    (tree / "pyproject.toml").write_text("[project\n")
    with pytest.raises(BuildError, match=r"pyproject\.toml cannot be read"):
        read(tree)


def test_files_that_include_each_other_are_read_once(tree):
    (tree / "requirements" / "common.txt").write_text("-r cpu.txt\nnumpy\n")
    assert read(tree).runtime.count("numpy") == 1
