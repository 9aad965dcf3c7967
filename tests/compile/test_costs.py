"""Expected costs of units: names from commands, the shipped table, the history, and guesses."""

import json
import os
from pathlib import Path

import pytest

from workspace.compile import costs
from workspace.compile.costs import LIGHT, Costs, Entry, History, Unit, unit_of
from workspace.core.errors import BuildError

NVCC = "nvcc -forward-unknown-to-host-compiler -x cu -c {} -o {}"


@pytest.mark.parametrize(
    ("argv", "unit"),
    [
        ("g++ -O2 -o CMakeFiles/_C.dir/csrc/a.cpp.o -c /tree/csrc/a.cpp", Unit("_C", "csrc/a.cpp")),
        (
            NVCC.format("/t/b.cu", "vllm-flash-attn/CMakeFiles/_vllm_fa2_C.dir/csrc/b.cu.o"),
            Unit("_vllm_fa2_C", "csrc/b.cu"),
        ),
        ("nvcc -E -o /tmp/x.ii /tree/csrc/a.cu", Unit("", "/tmp/x.ii", is_light=True)),
        ("g++ -shared -o _C.abi3.so a.o b.o", Unit("_C", "link")),
        (
            "g++ -shared -fPIC -I/t/csrc /t/csrc/python_api.cpp -ltorch -o /b/_C.cpython-312.so",
            Unit("_C", "/t/csrc/python_api.cpp"),
        ),
        ("rustc --crate-name tokio --edition=2021 src/lib.rs --out-dir /t", Unit("cargo", "tokio")),
        ("cc -c a.c -o a.o", Unit("", "a")),
        ("cc -c a.c", Unit("", "a.c")),
        ("cc a.c -o", Unit("-o", "a.c")),
    ],
)
def test_unit_is_named_by_what_its_command_writes(argv: str, unit: Unit) -> None:
    assert unit_of(argv.split()) == unit


def test_shipped_table_is_complete() -> None:
    entries = costs.read_table()
    assert len(entries) == 169
    assert sum(entry.seconds for entry in entries) / 60 == pytest.approx(284.8, abs=0.1)
    assert max(entry.peak_gib for entry in entries) == pytest.approx(9.48, abs=0.01)


def test_history_comes_before_table_and_table_before_guess() -> None:
    table = [Entry("_C", "csrc/a.cu", 10.0, 1.0), Entry("_C", "csrc/b.cu", 20.0, 2.0)]
    known = Costs(table, [Entry("_C", "csrc/a.cu", 11.0, 1.5)])
    assert [
        (
            known.expected(Unit("_C", f"csrc/{name}.cu")).origin,
            known.expected(Unit("_C", f"csrc/{name}.cu")).peak_gib,
        )
        for name in "abc"
    ] == [
        ("history", 1.5),
        ("table", 2.0),
        ("guess", 2.0),
    ]


def test_source_is_found_again_after_the_tree_or_the_folder_has_moved() -> None:
    table = [
        Entry("_q", "qutlass/csrc/gemm.cu", 176.0, 9.5),
        Entry("_q", "qutlass/ada/gemm.cu", 49.0, 1.7),
    ]
    known = Costs(table)
    assert known.expected(Unit("_q", "__/deps/x/qutlass/csrc/gemm.cu")).peak_gib == 9.5
    assert known.expected(Unit("_q", "home/me/qutlass/ada/gemm.cu")).peak_gib == 1.7
    # In neither folder: the entry with the larger peak.
    assert known.expected(Unit("_q", "new/gemm.cu")).peak_gib == 9.5
    assert known.expected(Unit("_other", "qutlass/csrc/gemm.cu")).origin == "guess"


def test_unknown_source_is_guessed_from_its_folder_where_that_has_enough_entries() -> None:
    fp4 = [Entry("_C", f"csrc/fp4/{n}.cu", 10.0 * n, 7.0 - n) for n in range(1, costs.NEAREST + 1)]
    table = [*fp4, Entry("_C", "csrc/moe/c.cu", 900.0, 9.0), Entry("_C", "x.cpp", 1, 11)]
    known = Costs(table)
    assert known.expected(Unit("_C", "csrc/fp4/new.cu")) == costs.Cost(30.0, 6.0, "guess")
    assert known.expected(Unit("_C", "moved/csrc/fp4/new.cu")).peak_gib == 6.0
    assert known.expected(Unit("_C", "csrc/gdn/new.cu")).peak_gib == 9.0


def test_single_neighbour_in_a_folder_does_not_decide_alone() -> None:
    table = [
        Entry("_C", "csrc/cutlass/moe/moe_data.cu", 10.0, 0.42),
        *(Entry("_C", f"csrc/cutlass/c3x/mm_{n}.cu", 100.0 + n, 7.0 + n) for n in range(4)),
        Entry("_C", "csrc/norm.cu", 3.0, 0.3),
    ]
    guessed = Costs(table).expected(Unit("_C", "csrc/cutlass/moe/grouped_mm.cu"))
    assert guessed.peak_gib >= 7.0
    assert 50 < guessed.seconds < 200


def test_unit_that_took_an_h200_by_surprise_is_guessed_to_be_large() -> None:
    source = "csrc/libtorch_stable/quantization/w8a8/cutlass/moe/grouped_mm_c3x_sm90.cu"
    guessed = Costs(costs.read_table()).expected(Unit("_C_stable_libtorch", source))
    # Measured there: 130.5 s and 7.37 GiB.
    assert 7.37 <= guessed.peak_gib < 12
    assert 65 < guessed.seconds < 260


def test_guesses_of_the_shipped_table_from_each_other_seldom_lack_memory() -> None:
    table = costs.read_table()
    short = [
        entry.source
        for entry in table
        if Costs(other for other in table if other is not entry)
        .expected(Unit(entry.target, entry.source))
        .peak_gib
        < entry.peak_gib - 2
    ]
    assert len(short) <= 1


def test_real_sources_of_another_release_are_guessed_by_their_folder() -> None:
    known = Costs(costs.read_table())
    assert (
        known.expected(
            Unit(
                "_C_stable_libtorch", "csrc/libtorch_stable/quantization/fp4/mxfp4_experts_quant.cu"
            )
        ).peak_gib
        > 6.9
    )
    assert (
        known.expected(
            Unit("_C_stable_libtorch", "csrc/libtorch_stable/ngram_embedding_kernels.cu")
        ).peak_gib
        < 1.0
    )
    assert known.expected(Unit("_flashmla_C", "csrc/sm120/new.cu")).peak_gib >= 8.0


@pytest.mark.parametrize(
    "unit",
    [
        Unit("", ""),
        Unit("", "/"),
        Unit("_C", "link"),
        Unit("cargo", "tokio"),
        Unit("_C", "a.cu/"),
        Unit("_C", "\udcff.cu"),
    ],
)
def test_every_unit_has_an_expected_cost(unit: Unit) -> None:
    found = Costs(costs.read_table()).expected(unit)
    assert found.seconds > 0
    assert 0 < found.peak_gib < 12


def test_preprocessor_is_light_whatever_its_source() -> None:
    assert (
        Costs([Entry("_C", "a.cu", 900.0, 9.0)]).expected(Unit("_C", "a.cu", is_light=True))
        == LIGHT
    )


@pytest.mark.parametrize("line", ["_C\ta.cu\t1", "_C\ta.cu\tone\t500", "<<<<<<< HEAD", "\0"])
def test_damaged_table_is_an_error_with_its_name(tmp_path: Path, line: str) -> None:
    (tmp_path / "costs.tsv").write_text(f"# head\n_C\tb.cu\t1.0\t100\n{line}\n")
    with pytest.raises(BuildError, match=r"costs\.tsv cannot be read"):
        costs.read_table(tmp_path / "costs.tsv")


def test_history_is_read_by_the_next_build_of_the_same_setup_only(
    tmp_path: Path,
) -> None:
    file = tmp_path / "cache" / "history.json"
    first = History(file, setup="12.1a CUDA 13.0")
    assert first.warnings == ()
    first.add(Unit("_C", "a.cu"), seconds=12.0, peak_gib=1.5)
    first.save()
    assert History(file, setup="12.1a CUDA 13.0").entries == (Entry("_C", "a.cu", 12.0, 1.5),)
    assert History(file, setup="9.0 CUDA 13.0").entries == ()


def test_entries_of_a_parallel_build_are_kept(tmp_path: Path) -> None:
    one, other = History(tmp_path / "h", setup="s"), History(tmp_path / "h", setup="s")
    one.add(Unit("_C", "a.cu"), seconds=1.0, peak_gib=1.0)
    other.add(Unit("_C", "b.cu"), seconds=2.0, peak_gib=2.0)
    one.save()
    other.save()
    assert {entry.source for entry in History(tmp_path / "h", setup="s").entries} == {
        "a.cu",
        "b.cu",
    }


def test_number_of_kept_setups_is_bounded(tmp_path: Path) -> None:
    for number in range(costs.KEPT_SETUPS + 3):
        history = History(tmp_path / "h", setup=f"setup {number}")
        history.add(Unit("_C", "a.cu"), seconds=1.0, peak_gib=1.0)
        history.save()
    assert len(json.loads((tmp_path / "h").read_text())["setups"]) == costs.KEPT_SETUPS
    assert History(tmp_path / "h", setup=f"setup {number}").entries
    assert not History(tmp_path / "h", setup="setup 0").entries


def test_killed_compiler_is_expected_to_need_more_memory_than_it_held(
    tmp_path: Path,
) -> None:
    history = History(tmp_path / "h", setup="s")
    history.add(Unit("_C", "a.cu"), seconds=100.0, peak_gib=8.0)
    history.add(Unit("_C", "a.cu"), seconds=5.0, peak_gib=2.0, is_killed=True)
    assert history.entries == (Entry("_C", "a.cu", 100.0, 8.0),)
    history.add(Unit("_C", "a.cu"), seconds=120.0, peak_gib=10.0, is_killed=True)
    assert history.entries == (Entry("_C", "a.cu", 120.0, 12.5),)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"schema": 2, "setups": {}}',
        b'{"schema": 1}',
        b'{"schema": 1, "setups": []}',
        b'{"schema": 1, "setups": {"s": [["_C", "a.cu", 1.0]]}}',
        b'{"schema": 1, "setups": {"s": 3}}',
        b'{"schema": 1, "setups": {"s": [["_C", 7, 1.0, 1.0]]}}',
        b"[" * 100_000,
    ],
)
def test_damaged_history_is_reported_and_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "history.json"
    file.write_bytes(content)
    history = History(file, setup="s")
    assert history.entries == ()
    assert len(history.warnings) == 1
    assert "history.json is damaged" in history.warnings[0]
    history.add(Unit("_C", "a.cu"), seconds=1.0, peak_gib=1.0)
    history.save()
    again = History(file, setup="s")
    assert (again.warnings, len(again.entries)) == ((), 1)


def test_pipe_in_the_place_of_the_history_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "h")
    assert History(tmp_path / "h", setup="s").warnings


def test_price_of_a_target_is_of_all_its_measured_units() -> None:
    count, seconds = Costs(costs.read_table()).of_target("_vllm_fa2_C")
    assert count == 55
    assert 172 < seconds / 60 < 173
    own = [Entry("_vllm_fa2_C", f"{number}.cu", 60.0, 1.0) for number in range(55)]
    measured = Costs(costs.read_table(), [*own, Entry("_vllm_fa2_C", "link", 30.0, 1.0)])
    assert measured.of_target("_vllm_fa2_C") == (55, 55 * 60.0 + 30.0)
    assert Costs(()).of_target("_vllm_fa2_C") == (0, 0.0)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of this machine's own table, beside a copy of the shipped one."""
    shipped = tmp_path / "costs.tsv"
    shipped.write_bytes(costs.TABLE.read_bytes())
    monkeypatch.setattr(costs, "TABLE", shipped)
    return costs.own_table()


def test_table_of_a_machine_of_this_kind_comes_before_the_shipped_one(own: Path) -> None:
    shipped = costs.read_table()
    known = Entry(shipped[0].target, shipped[0].source, 77.0, 7.5)
    new = Entry("_C", "csrc/new.cu", 5.0, 0.5)
    own.write_text(costs.table_text([new, known], setup="cuda 12.1a", date="2026-12-01"))
    assert costs.read_table(own) == (known, new)
    found = {(one.target, one.source): one for one in costs.known_entries()}
    assert found[known.target, known.source] == known
    assert found["_C", "csrc/new.cu"] == new
    assert len(found) == len(shipped) + 1


def test_table_of_another_kind_of_machine_is_refused_with_both_kinds(own: Path) -> None:
    text = costs.table_text([], setup="cuda 12.1a", date="2026-12-01")
    own.write_text(text.replace(costs.machine_kind(), "riscv64-3-cores"))
    with pytest.raises(BuildError, match=f"riscv64-3-cores, not {costs.machine_kind()}"):
        costs.known_entries()
    own.write_text(text.replace(f"# machine: {costs.machine_kind()}\n", ""))
    with pytest.raises(BuildError, match="it names none"):
        costs.known_entries()


def test_newest_setup_of_the_history_is_the_one_that_was_compiled_last(tmp_path: Path) -> None:
    file = tmp_path / "h"
    assert costs.newest_setup(file) == ("", ())
    for setup in ("one", "other", "one"):
        history = History(file, setup=setup)
        history.add(Unit("_C", f"{setup}.cu"), seconds=1.0, peak_gib=0.1)
        history.save()
    assert costs.newest_setup(file) == ("one", (Entry("_C", "one.cu", 1.0, 0.1),))
