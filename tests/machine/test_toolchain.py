from pathlib import Path

from workspace.machine import toolchain

NVCC = (
    'case "$1" in --version) echo "Cuda compilation tools, release {version}, V{version}.88";;'
    ' --dryrun) echo "#\\$ TOP={home}/bin/.." >&2;; *) exit 1;; esac'
)


def make_toolkit(house, home: Path, version: str = "13.0") -> Path:
    return house.program("nvcc", NVCC.format(version=version, home=home), folder=home / "bin")


def test_cuda_home_wins_over_path(house, tmp_path):
    make_toolkit(house, tmp_path / "wanted", "13.1")
    (house.bin / "nvcc").symlink_to(make_toolkit(house, tmp_path / "other"))
    found = house.machine(CUDA_HOME=str(tmp_path / "wanted")).toolkit()
    assert found == toolchain.Toolkit(
        tmp_path / "wanted", "13.1", tmp_path / "wanted" / "bin" / "nvcc"
    )


def test_broken_cuda_home_is_no_toolkit_although_path_has_one(house, tmp_path):
    (house.bin / "nvcc").symlink_to(make_toolkit(house, tmp_path / "other"))
    assert house.machine(CUDA_HOME=str(tmp_path / "gone")).toolkit() is None


def test_home_is_found_behind_a_wrapper_script_on_path(house, tmp_path):
    real = make_toolkit(house, tmp_path / "cuda-13.0")
    house.program("nvcc", f'exec "{real}" "$@"')
    found = house.machine().toolkit()
    assert found is not None
    assert (found.home, found.nvcc) == (tmp_path / "cuda-13.0", real)


def test_home_is_found_behind_a_link_when_nvcc_does_not_print_it(house, tmp_path):
    real = house.program(
        "nvcc",
        '[ "$1" = --version ] && echo "release 12.9, V12.9.1"',
        folder=tmp_path / "cuda" / "bin",
    )
    (house.bin / "nvcc").symlink_to(real)
    found = house.machine().toolkit()
    assert found is not None
    assert (found.home, found.version) == (tmp_path / "cuda", "12.9")


def test_nvcc_that_does_not_run_is_no_toolkit(house, tmp_path):
    house.program("nvcc", "echo 'release 13.0'; exit 127", folder=tmp_path / "cuda" / "bin")
    assert house.machine(CUDA_HOME=str(tmp_path / "cuda")).toolkit() is None


def test_compiler_is_the_one_that_cxx_names_with_its_launcher(house):
    house.program("g++", "echo 12.2.0")
    house.program("g++-13", "echo 13.3.0")
    house.program("ccache", 'exec "$@"')
    assert house.machine().compiler_version() == "12.2.0"
    assert house.machine(CXX="ccache g++-13").compiler_version() == "13.3.0"


def test_compiler_that_is_missing_or_misspelt_is_none(house):
    assert house.machine(CXX="no-such-compiler").compiler_version() is None
    assert house.machine(CXX='"unbalanced').compiler_version() is None
