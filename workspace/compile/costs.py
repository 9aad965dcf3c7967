"""Expected costs of compiling a unit: its name, its seconds and memory, and their origin.

This machine's own history comes first, then a table that `nox -s spark` wrote on a machine of the
same kind (costs-<kind>.tsv), then the shipped table (costs.tsv), then a guess that assumes rather
too much memory than too little.
"""

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from workspace.core import hints, records
from workspace.core.errors import BuildError
from workspace.core.files import read_regular

TABLE = Path(__file__).with_name("costs.tsv")
# Number of setups (architecture list, toolkit, build type) whose figures are kept.
KEPT_SETUPS = 8
_MIB = 1024
_COLUMNS = "target\tsource\tseconds\tpeak_mib"
# The line of a table that names the kind of machine on which it was measured.
_MEASURED_ON = "# machine: "


@dataclass(frozen=True)
class Unit:
    """A call of a compiler. `is_light`: the preprocessor of a compiler cache, which runs before the
    compiler and is short.
    """

    target: str
    source: str
    is_light: bool = False


@dataclass(frozen=True)
class Cost:
    """Seconds and peak GiB of a unit, and their origin."""

    seconds: float
    peak_gib: float
    origin: Literal["history", "table", "guess"]


@dataclass(frozen=True)
class Entry:
    """Measured cost of a unit."""

    target: str
    source: str
    seconds: float
    peak_gib: float


# The fewest entries that a guess is made from, where the target has so many: on an H200 the only
# measured unit of a folder took 0.42 GiB, and the unit that was guessed from it 7.37 GiB.
NEAREST = 5
# The source of a unit that links objects.
LINK = "link"
# A killed compiler is expected to need so many times the memory it held; the next kill raises it
# again.
KILLED_HELD = 1.25
# The preprocessor before a cache miss takes about 1 s and 160 MiB.
LIGHT = Cost(1.0, 0.25, "guess")
# For targets that are not in the table, by the suffix of the source; the last for links, Rust and
# all others.
_UNKNOWN: Mapping[str, Cost] = {
    ".cu": Cost(120.0, 8.0, "guess"),
    ".cpp": Cost(40.0, 2.5, "guess"),
    ".cc": Cost(40.0, 2.5, "guess"),
    ".cxx": Cost(40.0, 2.5, "guess"),
    ".c": Cost(5.0, 0.5, "guess"),
    "": Cost(20.0, 2.0, "guess"),
}
_SOURCES = {suffix for suffix in _UNKNOWN if suffix}


def unit_of(argv: Sequence[str]) -> Unit:
    """Return the unit that a compiler is called for, by its output: CMake writes
    CMakeFiles/TARGET.dir/SOURCE.o.
    """
    if "--crate-name" in argv[:-1]:
        return Unit("cargo", argv[argv.index("--crate-name") + 1])
    is_light = "-E" in argv
    output = argv[argv.index("-o") + 1] if "-o" in argv[:-1] else argv[-1]
    if unit := unit_at(output):
        return replace(unit, is_light=is_light)
    if "-c" in argv or is_light:
        return Unit("", output.removesuffix(".o"), is_light)
    # DeepGEMM's builder compiles and links in one command: its output has the name of another
    # target's.
    source = next(
        (argument for argument in argv if PurePosixPath(argument).suffix in _SOURCES), LINK
    )
    return Unit(PurePosixPath(output).name.split(".")[0], source)


def unit_at(output: str) -> Unit | None:
    """Return the unit of an output of CMake, None if it is no object of a target."""
    parts = PurePosixPath(output).parts
    if "CMakeFiles" not in parts[:-2]:
        return None
    at = parts.index("CMakeFiles") + 1
    return Unit(parts[at].removesuffix(".dir"), "/".join(parts[at + 1 :]).removesuffix(".o"))


class Costs:
    """Known costs of units: `history` of this machine before `table`."""

    def __init__(self, table: Iterable[Entry], history: Iterable[Entry] = ()) -> None:
        self._table, self._history = _by_target(table), _by_target(history)

    def expected(self, unit: Unit) -> Cost:
        """Return the expected cost of a unit; guess it if it is unknown."""
        if unit.is_light:
            return LIGHT
        if found := _same(self._history.get(unit.target, ()), unit.source):
            return Cost(found.seconds, found.peak_gib, "history")
        if found := _same(self._table.get(unit.target, ()), unit.source):
            return Cost(found.seconds, found.peak_gib, "table")
        return _guess(
            (*self._history.get(unit.target, ()), *self._table.get(unit.target, ())), unit.source
        )

    def of_target(self, target: str) -> tuple[int, float]:
        """Return the number of measured units of a target, and the seconds of them and its link;
        the history counts where it has as many units as the table.
        """
        known, table = (rows.get(target, ()) for rows in (self._history, self._table))
        entries = known if len(known) >= len(table) else table
        count = sum(entry.source != LINK for entry in entries)
        return count, sum(entry.seconds for entry in entries)


def _by_target(entries: Iterable[Entry]) -> dict[str, tuple[Entry, ...]]:
    sorted_out: dict[str, list[Entry]] = {}
    for entry in entries:
        sorted_out.setdefault(entry.target, []).append(entry)
    return {target: tuple(rows) for target, rows in sorted_out.items()}


def _same(entries: Sequence[Entry], source: str) -> Entry | None:
    """Return the entry of a source: folders move between releases and checkouts, so the longest
    common end of the path decides.
    """
    wanted = PurePosixPath(source).parts
    named = (
        [entry for entry in entries if PurePosixPath(entry.source).name == wanted[-1]]
        if wanted
        else []
    )
    return max(
        named,
        key=lambda entry: (_common_end(PurePosixPath(entry.source).parts, wanted), entry.peak_gib),
        default=None,
    )


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the number of equal parts at the end of two paths."""
    return next(
        (
            count
            for count, (left, right) in enumerate(zip(reversed(one), reversed(other), strict=False))
            if left != right
        ),
        min(len(one), len(other)),
    )


def _guess(known: Sequence[Entry], source: str) -> Cost:
    """Return the median of seconds and the largest peak of the NEAREST entries of the target, or a
    default.

    The median of peaks would be too low by more than 2 GiB for 8 units of the shipped table, each
    guessed from the others; the largest peak is for 1.
    """
    suffix = PurePosixPath(source).suffix
    alike = sorted(
        (_distance(entry.source, source), entry.seconds, entry.peak_gib)
        for entry in known
        if PurePosixPath(entry.source).suffix == suffix
    )
    if not alike:
        return _UNKNOWN.get(suffix, _UNKNOWN[""])
    farthest = alike[:NEAREST][-1][0]
    near = [(seconds, peak) for distance, seconds, peak in alike if distance <= farthest]
    return Cost(
        statistics.median(seconds for seconds, _ in near), max(peak for _, peak in near), "guess"
    )


def _distance(one: str, other: str) -> int:
    """Return the number of folders in which two paths differ; their order may have changed."""
    return len({*PurePosixPath(one).parts[:-1]} ^ {*PurePosixPath(other).parts[:-1]})


def read_table(path: Path = TABLE) -> tuple[Entry, ...]:
    """Return the entries of a table. Raises BuildError for a damaged one."""
    try:
        rows = [
            line.split("\t")
            for line in read_regular(path).decode().splitlines()
            if not line.startswith("#") and line != _COLUMNS
        ]
        return tuple(
            Entry(target, source, float(seconds), float(peak_mib) / _MIB)
            for target, source, seconds, peak_mib in rows
        )
    except (OSError, ValueError) as exc:
        raise BuildError(
            f"the cost table {path.name} cannot be read: {exc}",
            hint=hints.text("core.git_status", folder=path.parent),
        ) from exc


def machine_kind() -> str:
    """Return the kind of this machine, on which seconds and peaks depend: `aarch64-20-cores`."""
    return f"{platform.machine()}-{len(os.sched_getaffinity(0))}-cores"


def own_table() -> Path:
    """Return the place of a table that was measured on a machine of this kind."""
    return TABLE.with_name(f"costs-{machine_kind()}.tsv")


def known_entries() -> tuple[Entry, ...]:
    """Return the entries of the shipped table, and instead of them those of `own_table`, if it is
    there.

    Raises BuildError for a damaged table, and for one that was measured on another kind of machine.
    """
    path = own_table()
    if not path.exists():
        return read_table()
    own, lines = read_table(path), read_regular(path).decode().splitlines()
    if f"{_MEASURED_ON}{machine_kind()}" not in lines:
        named = next((line for line in lines if line.startswith(_MEASURED_ON)), "")
        raise BuildError(
            f"the cost table {path.name} was measured on another machine:"
            f" {named.removeprefix(_MEASURED_ON) or 'it names none'}, not {machine_kind()}",
            hint=hints.text("core.git_status", folder=path.parent),
        )
    return tuple({(one.target, one.source): one for one in (*read_table(), *own)}.values())


def table_text(entries: Iterable[Entry], *, setup: str, date: str) -> str:
    """Return entries as a table that `read_table` reads; the largest first, as a build begins."""
    ordered = sorted(entries, key=lambda one: -one.seconds * one.peak_gib)
    rows = (
        f"{one.target}\t{one.source}\t{one.seconds:.1f}\t{one.peak_gib * _MIB:.0f}"
        for one in ordered
    )
    head = (
        "# What units of a real build cost, measured by `nox -s spark`.",
        f"{_MEASURED_ON}{machine_kind()}",
        f"# setup: {setup}; {date}",
        _COLUMNS,
    )
    return "".join(f"{line}\n" for line in (*head, *rows))


@dataclass(frozen=True)
class _History(records.Record, schema=1):
    """Target, source, seconds and peak GiB of each unit, by setup."""

    setups: Mapping[str, Sequence[tuple[str, str, float, float]]]


class History:
    """Measured costs of this machine, in one file. `setup` identifies what the figures depend on:
    architectures, toolkit, build type.

    `warnings` has a message if the file was damaged; the next `save` writes a new one.
    """

    def __init__(self, path: Path, *, setup: str) -> None:
        self.path, self.setup = path, setup
        self._new: dict[tuple[str, str], Entry] = {}
        known, self.warnings = _read_history(path)
        self._known = {(entry.target, entry.source): entry for entry in known.get(setup, ())}

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple({**self._known, **self._new}.values())

    def add(self, unit: Unit, *, seconds: float, peak_gib: float, is_killed: bool = False) -> None:
        """Add a measurement. A killed compiler needs more memory and time than it was measured
        with.
        """
        key = (unit.target, unit.source)
        before = self._new.get(key) or self._known.get(key)
        if is_killed:
            seconds, peak_gib = (
                max(seconds, before.seconds if before else 0.0),
                max(peak_gib * KILLED_HELD, before.peak_gib if before else 0.0),
            )
        self._new[key] = Entry(*key, round(seconds, 2), round(peak_gib, 4))

    def save(self) -> None:
        """Add the new entries to the file, which other builds may have changed. Raises OSError on
        failure.
        """
        if not self._new:
            return
        known, _ = _read_history(self.path)
        ours = {
            (entry.target, entry.source): entry for entry in known.pop(self.setup, ())
        } | self._new
        kept = dict([*known.items()][-(KEPT_SETUPS - 1) :]) | {self.setup: tuple(ours.values())}
        setups = {
            name: [(e.target, e.source, e.seconds, e.peak_gib) for e in entries]
            for name, entries in kept.items()
        }
        records.write(self.path, _History(setups), indent=None)
        self._known, self._new = ours, {}


def newest_setup(path: Path) -> tuple[str, tuple[Entry, ...]]:
    """Return the setup that was compiled last, with all its measured units; empty if there is none.

    `History.save` writes the setup of a build last.
    """
    known, _ = _read_history(path)
    return [("", ()), *known.items()][-1]


def _read_history(path: Path) -> tuple[dict[str, tuple[Entry, ...]], tuple[str, ...]]:
    try:
        record = records.load(path, _History)
    except records.DecodeError:
        return {}, (
            (
                f"the history of compile times {path} is damaged: the next build replaces it, and"
                " until then the shipped table is used"
            ),
        )
    return {
        name: tuple(Entry(*row) for row in rows)
        for name, rows in (record.setups if record else {}).items()
    }, ()
