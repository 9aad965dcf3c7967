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
SCRIPT = """
import glob
for name in (*glob.glob("requirements/**/*.txt", recursive=True), *glob.glob("pyproject.toml")):
    lines = open(name).readlines()
    open(name, "w").writelines(line for line in lines if "torch" not in line.lower())
"""
FILES = {
    "pyproject.toml": PYPROJECT,
    "tools/use_existing_torch.py": SCRIPT,
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
    house,
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
        settings=house.settings(),
    )


def test_lines_are_sorted_by_how_they_are_installed(house, tree):
    found = read(house, tree)
    assert found.torch == "torch==2.13.0+cpu"
    assert found.companions == ("torchvision", "torchcodec>=0.14")
    assert found.accelerators == ("xgrammar==0.2.7",)
    assert found.runtime == ("numpy", "six>=1.16.0")
    assert found.python == SpecifierSet(">=3.10,<3.15")


def test_cmake_is_bounded_because_triton_shares_the_environment_and_its_namesakes_are_not(
    house, tree
):
    assert read(house, tree).build == ("cmake>=3.26.1,<4", "cmake-format", "wheel")


def test_markers_are_judged_for_the_built_python_and_not_for_the_one_that_runs_the_tools(
    house, tree
):
    assert "six>=1.16.0" not in read(house, tree, python="3.11.7").runtime
    assert "py-cpuinfo" in read(house, tree, machine="aarch64").runtime
    assert read(house, tree, machine="riscv64").torch == "torch==2.13.0"
    assert read(house, tree, machine="riscv64").accelerators == ()


def test_line_that_the_index_cannot_serve_is_left_out_with_its_reason(house, tree):
    line, why = read(house, tree).left_out[0]
    assert line.startswith("triton @ https://")
    assert "address of its own" in why
    assert read(house, tree, machine="aarch64").left_out == ()
    assert [line for line, _ in read(house, tree, device="cuda").left_out] == [
        "--extra-index-url https://example.org/whl/",
        "flashinfer-cubin==0.7.0",
    ]


def test_continued_line_and_extras_are_read(house, tree):
    assert "humming-kernels[cu13]==0.1.16" in read(house, tree, device="cuda").runtime


def test_beside_a_cpu_torch_no_dependency_may_install_companions_or_triton(house, tree):
    names = [line.split()[0] for line in read(house, tree).overrides]
    assert names == ["torchvision", "torchaudio", "torchcodec", "triton", "openai-harmony"]
    assert [line.split()[0] for line in read(house, tree, device="cuda").overrides] == [
        "openai-harmony"
    ]


def test_triton_that_the_tree_itself_takes_from_the_index_is_not_kept_out(house, tree):
    (tree / "requirements" / "cpu.txt").write_text(
        "torch==2.7.0+cpu\ntriton==3.2.0; platform_machine == 'x86_64'\n"
    )
    found = read(house, tree)
    assert found.accelerators == ("triton==3.2.0",)
    assert not any(line.startswith("triton") for line in found.overrides)


def test_existing_torch_is_kept_by_the_trees_own_script_and_the_tree_is_not_touched(house, tree):
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in tree.rglob("*")
        if path.is_file()
    }
    for device in ("cpu", "cuda"):
        found = read(house, tree, device=device, existing=True)
        assert (found.torch, found.companions) == ("", ())
        assert "numpy" in found.runtime
        assert "torchvision" in [line.split()[0] for line in found.overrides]
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in tree.rglob("*")
        if path.is_file()
    } == before


def test_script_is_found_in_the_root_of_older_trees(house, tree):
    (tree / "tools" / "use_existing_torch.py").rename(tree / "use_existing_torch.py")
    assert read(house, tree, existing=True).torch == ""


def test_missing_failing_or_idle_script_is_a_build_error(house, tree):
    script = tree / "tools" / "use_existing_torch.py"
    script.write_text("raise SystemExit('no')")
    with pytest.raises(BuildError, match="exited with 1"):
        read(house, tree, existing=True)
    script.write_text("")
    with pytest.raises(BuildError, match=r"left torch==2\.13\.0\+cpu in"):
        read(house, tree, existing=True)
    script.unlink()
    with pytest.raises(BuildError, match="has no use_existing_torch"):
        read(house, tree, existing=True)


@pytest.mark.parametrize(
    "names",
    [
        ("requirements/build.txt", "requirements/cpu.txt"),
        ("requirements-build.txt", "requirements-cpu.txt"),
    ],
)
def test_files_of_older_trees_are_found(house, tmp_path, names):
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
    found = read(house, old)
    assert (found.build, found.runtime, found.torch) == (("ninja",), ("psutil",), "torch==2.7.0")


def test_digest_follows_the_files_that_were_read_and_no_others(house, tree):
    first = read(house, tree).digest
    (tree / "requirements" / "cuda.txt").write_text("torch==1\n")
    assert read(house, tree).digest == first
    (tree / "requirements" / "common.txt").write_text("numpy<3\n")
    assert read(house, tree).digest != first


def test_line_that_is_no_requirement_is_an_error_with_file_and_line(house, tree):
    (tree / "requirements" / "common.txt").write_text("numpy\n\n<<<<<<< HEAD\nsix\n")
    with pytest.raises(
        BuildError, match=r"requirements/common\.txt, line 3: '<<<<<<< HEAD' is not a requirement"
    ):
        read(house, tree)


def test_tree_without_its_files_is_an_error_and_no_traceback(house, tree):
    (tree / "requirements" / "common.txt").unlink()
    with pytest.raises(BuildError, match=r"requirements/common\.txt of the tree cannot be read"):
        read(house, tree)
    with pytest.raises(BuildError, match="none of requirements/build/xpu"):
        read(house, tree, device="xpu")
    (tree / "pyproject.toml").write_text("[project\n")
    with pytest.raises(BuildError, match=r"pyproject\.toml cannot be read"):
        read(house, tree)


def test_files_that_include_each_other_are_read_once(house, tree):
    (tree / "requirements" / "common.txt").write_text("-r cpu.txt\nnumpy\n")
    assert read(house, tree).runtime.count("numpy") == 1
