"""Number of compilers and memory budget: the computation, its explanation, and invalid values."""

from pathlib import Path

import pytest

from workspace.compile import jobs, ninja
from workspace.core import settings
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout
from workspace.machine.hardware import Host


def load(
    root: Path,
    *,
    shell: dict[str, str] | None = None,
    dotenv: str = "",
    flags: dict[str, str | None] | None = None,
) -> settings.Settings:
    (root / ".env").write_text(dotenv, encoding="utf-8")
    return settings.load(Layout(root), environ={"HOME": str(root), **(shell or {})}, flags=flags)


def machine(total: float = 119.7, available: float = 110.0) -> Host:
    return Host("aarch64", 20, total, available)


def test_jobs_4_means_4_compilers_and_explains_it(tmp_path: Path) -> None:
    found = jobs.count(load(tmp_path), cores=20, flag="4")
    assert (found.count, found.nvcc_threads) == (4, 1)
    assert found.sentence == "4 compilers at once (--jobs 4; NVCC_THREADS 1)"


@pytest.mark.parametrize(
    ("flag", "shell", "dotenv", "number", "output"),
    [
        ("3", "5", "7", 3, "--jobs 3"),
        (None, "5", "7", 5, "MAX_JOBS=5 in the shell"),
        (None, None, "7", 7, "MAX_JOBS=7 in .env"),
        (None, None, None, 20, "auto: 20 cores"),
        ("auto", "5", "7", 20, "auto: 20 cores"),
        ("64", None, None, 64, "--jobs 64"),
    ],
)
def test_flag_outranks_the_shell_that_outranks_dotenv(
    tmp_path: Path,
    flag: str | None,
    shell: str | None,
    dotenv: str | None,
    number: int,
    output: str,
) -> None:
    given = load(
        tmp_path,
        shell={"MAX_JOBS": shell} if shell else {},
        dotenv=f"MAX_JOBS={dotenv}\n" if dotenv else "",
    )
    found = jobs.count(given, cores=20, flag=flag)
    assert found.count == number
    assert f"({output};" in found.sentence


def test_flag_taken_into_the_settings_is_shown_as_a_flag(tmp_path: Path) -> None:
    assert "--jobs 6;" in jobs.count(load(tmp_path, flags={"MAX_JOBS": "6"}), cores=20).sentence


@pytest.mark.parametrize(
    ("flag", "threads", "number", "each", "sentence"),
    [
        ("8", "4", 2, 4, "2 compilers of 4 threads at once (--jobs 8 / NVCC_THREADS 4)"),
        ("7", "4", 1, 4, "1 compiler of 4 threads at once (--jobs 7 / NVCC_THREADS 4)"),
        (
            "2",
            "4",
            1,
            2,
            "1 compiler of 2 threads at once (--jobs 2 / NVCC_THREADS 2, not the requested 4)",
        ),
        ("1", "4", 1, 1, "1 compiler at once (--jobs 1; NVCC_THREADS 1, not the requested 4)"),
    ],
)
def test_threads_of_nvcc_count_as_compilers_within_the_bound(
    tmp_path: Path, flag: str, threads: str, number: int, each: int, sentence: str
) -> None:
    found = jobs.count(load(tmp_path, dotenv=f"NVCC_THREADS={threads}\n"), cores=20, flag=flag)
    assert (found.count, found.nvcc_threads, found.sentence) == (number, each, sentence)
    assert found.count * found.nvcc_threads <= int(flag)


@pytest.mark.parametrize(
    "flag", ["0", "-1", "four", "", "4.5", "1e3", "٤", "9" * 12, "4 ", "auto4"]
)
def test_invalid_number_of_jobs_is_reported_with_the_next_command(
    tmp_path: Path, flag: str
) -> None:
    with pytest.raises(SettingsError, match="^--jobs: ") as caught:
        jobs.count(load(tmp_path), cores=20, flag=flag)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("./scripts/inv rebuild")


def test_auto_takes_the_available_memory_less_the_reserve() -> None:
    found = jobs.memory(machine())
    assert found.budget_gib == pytest.approx(110.0 - 11.97)
    assert (
        found.sentence
        == "98.0 GiB for compilers: 110.0 of 119.7 are available, 12.0 are reserved for the system"
    )
    assert jobs.memory(machine(), flag="auto") == found


def test_memory_of_a_resident_server_is_not_available() -> None:
    assert jobs.memory(machine(available=30.0)).budget_gib == pytest.approx(18.03)


def test_minimum_budget_is_used_and_explained_if_memory_is_short() -> None:
    found = jobs.memory(machine(available=5.0))
    assert found.budget_gib == jobs.LEAST_BUDGET_GIB
    assert "leaves too little" in found.sentence


@pytest.mark.parametrize(
    ("total", "reserve"), [(119.7, 11.97), (24.0, 2.4), (8.0, 2.0), (2.0, 1.0)]
)
def test_reserve_is_a_share_never_less_than_2_gib_and_never_more_than_half(
    total: float, reserve: float
) -> None:
    assert jobs.memory(machine(total, total)).reserve_gib == pytest.approx(reserve)


def test_requested_memory_is_used_and_missing_memory_is_reported() -> None:
    assert jobs.memory(machine(), flag="24").sentence == "24 GiB for compilers: --memory 24"
    found = jobs.memory(machine(available=20.0), flag="24.5")
    assert found.budget_gib == 24.5
    assert "only 8.0 are free now" in found.sentence


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("120", "has 119.7 GiB"),
        ("0", "at least 1"),
        ("0.5", "at least 1"),
        ("-4", "at least 1"),
        ("four", "four"),
    ],
)
def test_invalid_memory_is_reported_with_the_next_command(flag: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        jobs.memory(machine(), flag=flag)
    assert caught.value.hint is not None
    assert "--memory auto" in caught.value.hint


@pytest.mark.parametrize("flag", ["", "nan", "inf", "1e2", "24GiB", "9" * 9, "٢٤"])
def test_memory_that_only_python_reads_as_a_number_is_refused(flag: str) -> None:
    with pytest.raises(SettingsError):
        jobs.memory(machine(), flag=flag)


def test_ninja_sees_all_units_and_never_fewer_than_may_run() -> None:
    four = jobs.Jobs(4, 1, "")
    assert [ninja.visible(units, four) for units in (0, 3, 169, 5000)] == [
        4,
        4,
        169,
        ninja.MOST_VISIBLE,
    ]


def test_nested_builds_get_the_same_number_of_jobs() -> None:
    output = ninja.nested_environment(jobs.Jobs(4, 1, ""), launcher="/build/launcher")
    assert {
        output[name] for name in ("MAX_JOBS", "CARGO_BUILD_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL")
    } == {"4"}
    assert {output[name] for name in output if name.endswith(("LAUNCHER", "WRAPPER"))} == {
        "/build/launcher"
    }
