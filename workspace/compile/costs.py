"""What compiling a unit costs: its name, the seconds and the memory to expect, and where that is
known from.

This machine's own history comes first, then the shipped table (costs.tsv), then a guess that rather
has too much memory in it than too little.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from workspace.core.files import read_regular, write_atomic

TABLE = Path(__file__).with_name("costs.tsv")
SCHEMA = 1
# Builds of other architecture lists, toolkits and build types whose figures are kept beside the
# current one's.
KEPT_SETUPS = 8
_MIB = 1024
_COLUMNS = "target\tsource\tseconds\tpeak_mib"
# A day and a TiB: beyond these a figure is damage and no measurement.
_LONGEST_S, _LARGEST_GIB = 86_400.0, 1024.0


@dataclass(frozen=True)
class Unit:
    """One call of a compiler. `is_light`: a compiler cache's preprocessor, which comes before the
    compiler and is over soon.
    """

    target: str
    source: str
    is_light: bool = False


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock and GiB at the most, and how that is known."""

    seconds: float
    peak_gib: float
    origin: Literal["history", "table", "guess"]


@dataclass(frozen=True)
class Entry:
    """One measured unit."""

    target: str
    source: str
    seconds: float
    peak_gib: float


# The source of a unit that puts objects together.
LINK = "link"
# What a compiler needs is taken to be so many times what it held when it was killed; the next kill
# raises it again.
KILLED_HELD = 1.25
# The preprocessor of a cache miss takes about 1 s and 160 MiB.
LIGHT = Cost(1.0, 0.25, "guess")
# For targets that the table does not know, by what the source ends in; the last one for links, Rust
# and whatever else.
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
    """Name what a compiler is called for, by its output: CMake writes
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
    # Compiled and linked in one go, as DeepGEMM's builder does: its output bears the name of
    # another target's.
    source = next((word for word in argv if PurePosixPath(word).suffix in _SOURCES), LINK)
    return Unit(PurePosixPath(output).name.split(".")[0], source)


def unit_at(output: str) -> Unit | None:
    """Name the unit that an output of CMake's belongs to, None where it is no object of a
    target.
    """
    parts = PurePosixPath(output).parts
    if "CMakeFiles" not in parts[:-2]:
        return None
    at = parts.index("CMakeFiles") + 1
    return Unit(parts[at].removesuffix(".dir"), "/".join(parts[at + 1 :]).removesuffix(".o"))


class Costs:
    """What is known of units: `history` of this machine before `table`."""

    def __init__(self, table: Iterable[Entry], history: Iterable[Entry] = ()) -> None:
        self._table, self._history = _by_target(table), _by_target(history)

    def expected(self, unit: Unit) -> Cost:
        """Return what to expect of a unit. Never fails: what is not known is guessed."""
        if unit.is_light:
            return LIGHT
        if found := _same(self._history.get(unit.target, ()), unit.source):
            return Cost(found.seconds, found.peak_gib, "history")
        if found := _same(self._table.get(unit.target, ()), unit.source):
            return Cost(found.seconds, found.peak_gib, "table")
        return _guess(
            (*self._history.get(unit.target, ()), *self._table.get(unit.target, ())), unit.source
        )


def _by_target(entries: Iterable[Entry]) -> dict[str, tuple[Entry, ...]]:
    sorted_out: dict[str, list[Entry]] = {}
    for entry in entries:
        sorted_out.setdefault(entry.target, []).append(entry)
    return {target: tuple(rows) for target, rows in sorted_out.items()}


def _same(entries: Sequence[Entry], source: str) -> Entry | None:
    """The entry of this source: folders move between releases and checkouts lie anywhere, so the
    longest common end of the path decides.
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
    return next(
        (
            number
            for number, (left, right) in enumerate(
                zip(reversed(one), reversed(other), strict=False)
            )
            if left != right
        ),
        min(len(one), len(other)),
    )


def _guess(known: Sequence[Entry], source: str) -> Cost:
    """The hungriest of the same folder of the target, else of the target, else what such a source
    takes at the most.
    """
    path = PurePosixPath(source)
    alike = [entry for entry in known if PurePosixPath(entry.source).suffix == path.suffix]
    beside = [
        entry for entry in alike if PurePosixPath(entry.source).parent.name == path.parent.name
    ] or alike
    if not beside:
        return _UNKNOWN.get(path.suffix, _UNKNOWN[""])
    return Cost(
        sum(entry.seconds for entry in beside) / len(beside),
        max(entry.peak_gib for entry in beside),
        "guess",
    )


def derive(lines: Iterable[str]) -> tuple[Entry, ...]:
    """Turn a trace into entries, in the order in which the build began them.

    A line of a trace is a JSON object with target, source, start_s, wall_s and peak_rss_mib (cpu_s
    is not used).
    """
    records = sorted(
        (json.loads(line) for line in lines), key=lambda record: float(record["start_s"])
    )
    return tuple(
        Entry(
            record["target"],
            record["source"],
            float(record["wall_s"]),
            float(record["peak_rss_mib"]) / _MIB,
        )
        for record in records
    )


def encode(entries: Iterable[Entry], *, head: str) -> str:
    """Spell a table: the head as remarks, one line a unit, seconds to a tenth, memory in whole
    MiB.
    """
    remarks = "".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())
    rows = "".join(
        f"{entry.target}\t{entry.source}\t{max(entry.seconds, 0.1):.1f}\t{math.ceil(entry.peak_gib * _MIB)}\n"
        for entry in entries
    )
    return f"{remarks}{_COLUMNS}\n{rows}"


def read_table(path: Path = TABLE) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Return the entries of a table, and a sentence where lines of it are damaged: those are left
    out.
    """
    hint = f"guesses take their place; git checkout -- workspace/compile/{path.name} brings it back"
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as exc:
        return (), (f"the cost table {path.name} cannot be read ({exc}): {hint}",)
    entries, bad = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#") or line == _COLUMNS:
            continue
        words = line.split("\t")
        entry = _entry(*words) if len(words) == len(_COLUMNS.split("\t")) else None
        if entry:
            entries.append(entry)
        else:
            bad.append(number)
    if bad or not entries:
        return tuple(entries), (
            f"the cost table {path.name} is damaged{f' in line {bad[0]}' if bad else ''}: {hint}",
        )
    return tuple(entries), ()


def _entry(target: str, source: str, seconds: str, peak_mib: str) -> Entry | None:
    try:
        return _plausible(target, source, float(seconds), float(peak_mib) / _MIB)
    except ValueError:
        return None


def _plausible(target: object, source: object, seconds: object, peak_gib: object) -> Entry | None:
    """An entry of these, or None where one of them cannot be."""
    if not isinstance(target, str) or not isinstance(source, str) or not source:
        return None
    # bool is an int; nan compares false with everything.
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not 0 <= seconds <= _LONGEST_S
    ):
        return None
    if (
        isinstance(peak_gib, bool)
        or not isinstance(peak_gib, int | float)
        or not 0 < peak_gib <= _LARGEST_GIB
    ):
        return None
    return Entry(target, source, float(seconds), float(peak_gib))


class History:
    """What units took on this machine, in one file. `setup` names what the figures depend on:
    architectures, toolkit, build type.

    `warnings` has a sentence where the file was damaged; it is then begun anew with the next
    `save`.
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
        """Take in a measurement. Of a compiler that was killed it is known only that it takes more,
        and longer, than it had.
        """
        key = (unit.target, unit.source)
        before = self._new.get(key) or self._known.get(key)
        if is_killed:
            seconds, peak_gib = (
                max(seconds, before.seconds if before else 0.0),
                max(peak_gib * KILLED_HELD, before.peak_gib if before else 0.0),
            )
        if entry := _plausible(unit.target, unit.source, round(seconds, 2), round(peak_gib, 4)):
            self._new[key] = entry

    def save(self) -> None:
        """Write what is new to the file, beside what other builds have written meanwhile. Raises
        OSError where it cannot.
        """
        if not self._new:
            return
        known, _ = _read_history(self.path)
        ours = {
            (entry.target, entry.source): entry for entry in known.pop(self.setup, ())
        } | self._new
        kept = dict([*known.items()][-(KEPT_SETUPS - 1) :]) | {self.setup: tuple(ours.values())}
        record = {
            "schema": SCHEMA,
            "setups": {
                name: [[e.target, e.source, e.seconds, e.peak_gib] for e in entries]
                for name, entries in kept.items()
            },
        }
        write_atomic(self.path, json.dumps(record).encode() + b"\n")
        self._known, self._new = ours, {}


def _read_history(path: Path) -> tuple[dict[str, tuple[Entry, ...]], tuple[str, ...]]:
    try:
        record = json.loads(read_regular(path))
        if record["schema"] != SCHEMA:
            raise ValueError("of another version")
        setups = {
            name: tuple(_plausible(*row) for row in rows) for name, rows in record["setups"].items()
        }
    except FileNotFoundError:
        return {}, ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, (
            (
                f"the history of compile times {path} is damaged: it is begun anew, and the shipped"
                " table is used until then"
            ),
        )
    return {
        name: tuple(entry for entry in entries if entry) for name, entries in setups.items()
    }, ()
