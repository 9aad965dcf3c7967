"""How many compilers and how much memory: the arithmetic, its sentences, and what is no number."""

from pathlib import Path

import pytest

from workspace.compile import jobs
from workspace.core import settings
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout
from workspace.machine.hardware import Machine


def load(
    root: Path,
    *,
    shell: dict[str, str] | None = None,
    dotenv: str = "",
    flags: dict[str, str | None] | None = None,
) -> settings.Settings:
    (root / ".env").write_text(dotenv, encoding="utf-8")
    return settings.load(Layout(root), environ={"HOME": str(root), **(shell or {})}, flags=flags)


def machine(total: float = 119.7, available: float = 110.0) -> Machine:
    return Machine("aarch64", 20, total, available, ())


def test_jobs_4_means_4_and_says_so(tmp_path: Path) -> None:
    found = jobs.count(load(tmp_path), cores=20, flag="4")
    assert (found.count, found.nvcc_threads) == (4, 1)
    assert found.sentence == "4 compilers at once: --jobs 4; NVCC_THREADS 1"


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
def test_the_flag_outranks_the_shell_that_outranks_dotenv(
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
    assert f": {output};" in found.sentence


def test_a_flag_that_the_settings_took_is_called_a_flag(tmp_path: Path) -> None:
    assert "--jobs 6;" in jobs.count(load(tmp_path, flags={"MAX_JOBS": "6"}), cores=20).sentence


@pytest.mark.parametrize(
    ("flag", "threads", "number", "each", "sentence"),
    [
        ("8", "4", 2, 4, "2 compilers of 4 threads at once: --jobs 8 / NVCC_THREADS 4"),
        ("7", "4", 1, 4, "1 compiler of 4 threads at once: --jobs 7 / NVCC_THREADS 4"),
        (
            "2",
            "4",
            1,
            2,
            "1 compiler of 2 threads at once: --jobs 2 / NVCC_THREADS 2, not the 4 asked for",
        ),
        ("1", "4", 1, 1, "1 compiler at once: --jobs 1; NVCC_THREADS 1, not the 4 asked for"),
    ],
)
def test_threads_of_nvcc_are_compilers_too_so_that_the_product_never_exceeds_the_bound(
    tmp_path: Path, flag: str, threads: str, number: int, each: int, sentence: str
) -> None:
    found = jobs.count(load(tmp_path, dotenv=f"NVCC_THREADS={threads}\n"), cores=20, flag=flag)
    assert (found.count, found.nvcc_threads, found.sentence) == (number, each, sentence)
    assert found.count * found.nvcc_threads <= int(flag)


@pytest.mark.parametrize(
    "flag", ["0", "-1", "four", "", "4.5", "1e3", "٤", "9" * 12, "4 ", "auto4"]
)
def test_what_is_no_number_of_jobs_is_a_sentence_with_the_next_command(
    tmp_path: Path, flag: str
) -> None:
    with pytest.raises(SettingsError, match="^--jobs: ") as caught:
        jobs.count(load(tmp_path), cores=20, flag=flag)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("./scripts/inv rebuild")


def test_auto_takes_what_is_available_less_what_is_left_for_the_system() -> None:
    found = jobs.memory(machine())
    assert found.budget_gib == pytest.approx(110.0 - 11.97)
    assert (
        found.sentence
        == "98.0 GiB for compilers: 110.0 of 119.7 are available, 12.0 are left for the system"
    )
    assert jobs.memory(machine(), flag="auto") == found


def test_a_resident_server_counts_because_what_it_holds_is_not_available() -> None:
    assert jobs.memory(machine(available=30.0)).budget_gib == pytest.approx(18.03)


def test_with_nothing_to_spare_there_is_still_a_budget_and_the_sentence_says_that_it_is_the_least() -> (
    None
):
    found = jobs.memory(machine(available=5.0))
    assert found.budget_gib == jobs.LEAST_BUDGET_GIB
    assert "leaves too little" in found.sentence


@pytest.mark.parametrize(
    ("total", "reserve"), [(119.7, 11.97), (24.0, 2.4), (8.0, 2.0), (2.0, 1.0)]
)
def test_the_reserve_is_a_share_never_less_than_2_gib_and_never_more_than_half(
    total: float, reserve: float
) -> None:
    assert jobs.memory(machine(total, total)).reserve_gib == pytest.approx(reserve)


def test_memory_asked_for_is_taken_and_what_is_missing_now_is_said() -> None:
    assert jobs.memory(machine(), flag="24").sentence == "24 GiB for compilers: --memory 24"
    found = jobs.memory(machine(available=20.0), flag="24.5")
    assert found.budget_gib == 24.5
    assert "only 8.0 are to be had now" in found.sentence


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("120", "there are 119.7 GiB"),
        ("0", "at least 1"),
        ("0.5", "at least 1"),
        ("-4", "at least 1"),
        ("four", "four"),
    ],
)
def test_memory_that_cannot_be_is_a_sentence_with_the_next_command(flag: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        jobs.memory(machine(), flag=flag)
    assert caught.value.hint is not None
    assert "--memory auto" in caught.value.hint


@pytest.mark.parametrize("flag", ["", "nan", "inf", "1e2", "24GiB", "9" * 9, "٢٤"])
def test_memory_that_python_would_take_for_a_number_is_refused_too(flag: str) -> None:
    with pytest.raises(SettingsError):
        jobs.memory(machine(), flag=flag)


def test_ninja_sees_all_units_and_never_fewer_than_may_run() -> None:
    four = jobs.Jobs(4, 1, "")
    assert [jobs.visible(units, four) for units in (0, 3, 169, 5000)] == [
        4,
        4,
        169,
        jobs.MOST_VISIBLE,
    ]


def test_everything_that_starts_compilers_by_itself_is_told_the_same_number() -> None:
    output = jobs.environment(jobs.Jobs(4, 1, ""), ticket="/build/ticket")
    assert {
        output[name] for name in ("MAX_JOBS", "CARGO_BUILD_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL")
    } == {"4"}
    assert {output[name] for name in output if name.endswith(("LAUNCHER", "WRAPPER"))} == {
        "/build/ticket"
    }
