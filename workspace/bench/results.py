"""The record of one benchmark: what was measured, on what, where, and every sample by the start of
the process that gave it.

One JSON document. It is read whole or refused with a sentence; a record of a newer workspace is
refused as such.
"""

import datetime
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal

from workspace.bench import metrics
from workspace.core import settings
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout

SCHEMA = 1
Kind = Literal["latency", "throughput", "serve", "startup"]


@dataclass(frozen=True)
class Source:
    """What vendor/vllm held. `dirty` is a digest of edits on top of the commit, None without;
    `patches` are file names in their order.
    """

    pin: str
    base: str | None
    commit: str | None
    tree: str
    dirty: str | None
    patches: tuple[str, ...]
    kernels: str
    libraries: Mapping[str, str]


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str | None
    driver: str | None


@dataclass(frozen=True)
class Machine:
    """Where it was measured. `name` is the folder of its records: what it is, and a digest that
    tells it from another one of that kind.
    """

    name: str
    architecture: str
    processor: str
    cores: int
    memory_gib: float
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Software:
    vllm: str
    torch: str
    triton: str
    cuda: str
    python: str


@dataclass(frozen=True)
class Clocks:
    """What a GPU's driver said at one moment: MHz, degrees Celsius, watts, and why it holds the
    clocks back. None is what it does not say.
    """

    sm_mhz: float | None
    memory_mhz: float | None
    celsius: float | None
    watts: float | None
    throttled_by: str | None


@dataclass(frozen=True)
class Conditions:
    """How busy the machine was just before or after a start. `load` is the average number of
    running processes in the last minute.
    """

    load: float
    processor_mhz: float | None
    clocks: tuple[Clocks, ...] = ()


@dataclass(frozen=True)
class Start:
    """One start of the process: what it measured, by metric. Samples of one start are not
    independent of each other.
    """

    time: str
    seconds: float
    before: Conditions
    after: Conditions
    samples: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Record:
    """`repeat` starts were asked for; fewer are in a record whose run was interrupted. `flags` are
    the words that vLLM's benchmark was given.
    """

    kind: Kind
    label: str
    time: str
    workspace: str | None
    source: Source
    machine: Machine
    software: Software
    device: str
    model: str
    flags: tuple[str, ...]
    environment: Mapping[str, str]
    backends: tuple[str, ...]
    repeat: int
    starts: tuple[Start, ...]

    @property
    def is_complete(self) -> bool:
        return len(self.starts) >= self.repeat

    @property
    def stem(self) -> str:
        """The name of its file without the ending."""
        return f"{self.source.tree[:12]}-{self.label}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that every start has."""
        names = dict.fromkeys(name for start in self.starts for name in start.samples)
        return tuple(
            name for name in names if all(start.samples.get(name) for start in self.starts)
        )

    def values(self, metric: str) -> tuple[float, ...]:
        """One value for each start, the unit of statistics: the median of its samples."""
        return tuple(metrics.median(start.samples[metric]) for start in self.starts)


def encode(record: Record) -> bytes:
    """Write a record as JSON. The summary is for readers; whoever decodes works it out anew."""
    summary = {name: metrics.summary(record.values(name)) for name in record.metrics}
    return (
        json.dumps(
            {"schema": SCHEMA, **asdict(record), "summary": summary}, indent=1, allow_nan=False
        )
        + "\n"
    ).encode()


def write(path: Path, record: Record) -> None:
    """Put a record in its place, whole. Raises OSError."""
    write_atomic(path, encode(record))


def read(path: Path, *, place: str) -> Record:
    """Read a record; `place` is its path as a person types it. Raises SettingsError for what is
    none, is damaged, or is of a newer workspace.
    """
    try:
        return decode(read_regular(path))
    except OSError as exc:
        raise SettingsError(
            f"{place} cannot be read: {exc.strerror}", hint=f"ls -l {place}"
        ) from exc
    except Newer as exc:
        raise SettingsError(
            f"{place} has schema {exc}, this workspace reads {SCHEMA}: a newer one wrote it",
            hint="git pull",
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise SettingsError(
            f"{place} is no whole record of a benchmark: {exc}",
            hint=f"mv {place} {place}.damaged    measure again",
        ) from exc


class Newer(Exception):
    """The document has a schema that is not known yet."""


def decode(content: bytes) -> Record:
    """Raises ValueError with what is wrong where, and Newer for a schema that this workspace does
    not know.
    """
    try:
        document = json.loads(content, parse_constant=_no_number)
    except UnicodeDecodeError as exc:
        raise ValueError("it is not UTF-8") from exc
    except json.JSONDecodeError as exc:
        raise ValueError(f"it is no JSON from line {exc.lineno} on") from exc
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    schema = document.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise ValueError("schema is missing, or no number")
    if schema > SCHEMA:
        raise Newer(schema)
    record = _taken(Record, document, "")
    if (
        not isinstance(record, Record)
        or record.repeat < 1
        or not metrics.LABEL.fullmatch(record.label)
        or not record.source.tree
    ):
        raise ValueError("repeat, label or source.tree is not what a benchmark writes")
    for number, start in enumerate(record.starts):
        for name, samples in start.samples.items():
            if metrics.find(name) is None or not all(sample > 0 for sample in samples):
                raise ValueError(
                    f"starts[{number}].samples.{name} is no metric with positive samples"
                )
    return record


def _no_number(word: str) -> float:
    raise ValueError(f"{word} stands where a number should")


def _taken(kind: object, found: object, where: str) -> object:
    """Return `found` as a value of type `kind`. Raises ValueError where it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(found, dict):
            hints = typing.get_type_hints(kind)
            return kind(
                **{
                    part.name: _taken(
                        hints[part.name], found.get(part.name), f"{where}.{part.name}".lstrip(".")
                    )
                    for part in fields(kind)
                }
            )
    elif origin is tuple:
        if isinstance(found, list):
            return tuple(
                _taken(arguments[0], one, f"{where}[{number}]") for number, one in enumerate(found)
            )
    elif origin is types.UnionType:
        return None if found is None else _taken(arguments[0], found, where)
    elif origin is Literal:
        if found in arguments:
            return found
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(found, dict):
            return {
                name: _taken(arguments[1], one, f"{where}.{name}") for name, one in found.items()
            }
    elif kind is float:
        if isinstance(found, int | float) and not isinstance(found, bool) and _is_finite(found):
            return float(found)
    elif isinstance(kind, type) and isinstance(found, kind) and not isinstance(found, bool):
        return found
    raise ValueError(
        f"{where or 'it'} is {'missing' if found is None else 'not what a benchmark writes'}"
    )


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


LIST = "./scripts/inv bench"


@dataclass(frozen=True)
class Entry:
    """A file below results/, and its record or the sentence that says why there is none."""

    path: Path
    record: Record | None
    problem: str = ""


def record_path(layout: Layout, one: Record) -> Path:
    return layout.results / one.machine.name / f"{one.stem}.json"


def entries(layout: Layout) -> tuple[Entry, ...]:
    """Every record, newest first; what is damaged comes last."""
    found = [_entry(layout, path) for path in sorted(layout.results.glob("*/*.json"))]
    return tuple(
        sorted(
            found,
            key=lambda entry: instant(entry.record.time) if entry.record else 0.0,
            reverse=True,
        )
    )


def instant(time: str) -> float:
    """Seconds since 1970 of a record's time, 0 where it is none."""
    try:
        return datetime.datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def find(layout: Layout, word: str) -> Entry:
    """Return the record that a word means: a path, the name of its file, the beginning of that, or
    a label.

    Raises SettingsError where none or several are meant, and for one that cannot be read.
    """
    place = Path(word)
    if word.endswith(".json") and place.is_file():
        return Entry(place, read(place, place=word))
    there = sorted(layout.results.glob("*/*.json"))
    stems = [path for path in there if path.stem == word]
    meant = (
        stems
        or [path for path in there if path.stem.partition("-")[2] == word]
        or [path for path in there if path.stem.startswith(word)]
    )
    if not word or not meant:
        alike = settings.nearest(
            word, [name for path in there for name in (path.stem, path.stem.partition("-")[2])]
        )
        hint = (
            f"did you mean {alike}? {LIST}"
            if alike
            else LIST
            if there
            else "./scripts/nox -s bench    measures; there are no records yet"
        )
        raise SettingsError(f"there is no record {settings.shortened(word)!r}", hint=hint)
    if len(meant) > 1:
        raise SettingsError(
            f"{word} may be any of {len(meant)} records",
            hint="say which one",
            details=tuple(layout.relative(path) for path in meant),
        )
    return Entry(meant[0], read(meant[0], place=layout.relative(meant[0])))


def _entry(layout: Layout, path: Path) -> Entry:
    try:
        return Entry(path, read(path, place=layout.relative(path)))
    except SettingsError as exc:
        return Entry(path, None, exc.message)


def show_records(layout: Layout, *, console: Console, as_json: bool) -> None:
    """Print one row a record: whole, interrupted or damaged, and what it measured first."""
    there = entries(layout)
    if as_json:
        console.data(
            json.dumps(
                {"schema": 1, "records": [_document(layout, entry) for entry in there]}, indent=1
            )
        )
        return
    for entry in there:
        if entry.record is None:
            console.row("FAIL", entry.path.stem, entry.problem)
        else:
            one = entry.record
            console.row("ok" if one.is_complete else "warn", one.stem, f" {described(one)}")
    if not there:
        console.info("no benchmark was recorded yet")
    console.info(
        "next: "
        + (
            "./scripts/inv bench.compare A B"
            if sum(entry.record is not None for entry in there) > 1
            else "./scripts/nox -s bench"
        )
    )


def described(one: Record) -> str:
    """What a record is, in a line."""
    starts = (
        f"{len(one.starts)} starts"
        if one.is_complete
        else f"{len(one.starts)} of {one.repeat} starts, interrupted"
    )
    return "  ".join(
        (
            one.kind,
            one.model,
            starts,
            *(measured_text(one, name) for name in one.metrics[:1]),
            one.time[:16].replace("T", " "),
            one.machine.name,
        )
    )


def measured_text(one: Record, name: str) -> str:
    """The median of a metric over the starts, with its unit and its variation."""
    values = one.values(name)
    spread = f" ± {metrics.variation(values):.1%}" if len(values) > 1 else ""
    return f"{name} {metrics.median(values):.4g} {metrics.known(name).unit}{spread}"


def _document(layout: Layout, entry: Entry) -> dict[str, object]:
    place, one = layout.relative(entry.path), entry.record
    if one is None:
        return {"path": place, "problem": entry.problem}
    medians = {name: metrics.median(one.values(name)) for name in one.metrics}
    said = {
        "path": place,
        "kind": one.kind,
        "label": one.label,
        "tree": one.source.tree,
        "time": one.time,
        "machine": one.machine.name,
        "model": one.model,
    }
    return said | {"starts": len(one.starts), "repeat": one.repeat, "medians": medians}
