"""Records of benchmarks: their format, their files below results/, and their list.

A record is one JSON document with the samples of each start of the process. A record that is
damaged, or that a newer workspace wrote, is refused.
"""

import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workspace.bench import metrics
from workspace.core import records, settings
from workspace.core.console import Console, Row, State
from workspace.core.errors import SettingsError
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout, typed
from workspace.core.records import DecodeError, NewerSchema

LIST = "./scripts/inv bench"
_MEASURE = "./scripts/nox -s bench    measures, and writes a record"
# Keys by which the result files of other programs are known: vllm/benchmarks/{serve,latency,
# throughput,startup}.py and lib/utils.py, guidellm, llama-benchy, lm-eval, pytest-benchmark.
_ORIGINS: Mapping[str, set[str]] = {
    "`vllm bench serve`": {"completed", "request_throughput", "output_throughput"},
    "`vllm bench latency`": {"avg_latency", "latencies", "percentiles"},
    "`vllm bench throughput`": {"elapsed_time", "num_requests", "tokens_per_second"},
    "`vllm bench startup`": {"avg_cold_startup_time", "avg_warm_startup_time"},
    "vLLM in PyTorch's benchmark format": {"benchmark", "model", "metric"},
    "lm-eval": {"results", "versions", "n-shot"},
    "pytest-benchmark": {"machine_info", "commit_info", "benchmarks"},
    "guidellm or llama-benchy": {"benchmarks"},
}
Kind = Literal["latency", "throughput", "serve", "startup"]


@dataclass(frozen=True)
class Source:
    """The content of vendor/vllm; `dirty` is a digest of uncommitted edits, None without edits.

    `patches` are file names in the order of the series.
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
    """The machine; its `name`, the kind and a digest, is the folder of its records."""

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
    """A GPU's clocks in MHz, its temperature and power, and why the driver limits the clocks.

    None: the driver does not report the value.
    """

    sm_mhz: float | None
    memory_mhz: float | None
    celsius: float | None
    watts: float | None
    throttled_by: str | None


@dataclass(frozen=True)
class Conditions:
    """The state of the machine just before or after a start.

    `load` is the average number of running processes in the last minute.
    """

    load: float
    processor_mhz: float | None
    clocks: tuple[Clocks, ...] = ()


@dataclass(frozen=True)
class Start:
    """One start of the process. Its samples, by metric, are not independent of each other."""

    time: str
    seconds: float
    before: Conditions
    after: Conditions
    samples: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Record(records.Record, schema=1):
    """A benchmark of one tree on one machine, with the `flags` that vLLM's benchmark got.

    It has fewer than `repeat` starts if its run was interrupted.
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

    def validate(self) -> None:
        if self.repeat < 1 or not metrics.LABEL.fullmatch(self.label) or not self.source.tree:
            raise DecodeError("repeat, label or source.tree is not what a benchmark writes")
        for index, start in enumerate(self.starts):
            for name, samples in start.samples.items():
                if metrics.find(name) is None or not all(sample > 0 for sample in samples):
                    raise DecodeError(
                        f"starts[{index}].samples.{name} is no metric with positive samples"
                    )
        try:
            records.encode(self)
        except ValueError as exc:
            raise DecodeError("it has NaN or infinity in the place of a number") from exc

    @property
    def is_complete(self) -> bool:
        return len(self.starts) >= self.repeat

    @property
    def stem(self) -> str:
        """The name of the record's file without the suffix."""
        return f"{self.source.tree[:12]}-{self.label}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that all starts have."""
        names = dict.fromkeys(name for start in self.starts for name in start.samples)
        return tuple(
            name for name in names if all(start.samples.get(name) for start in self.starts)
        )

    def values(self, metric: str) -> tuple[float, ...]:
        """Return one value for each start, the unit of statistics: the median of its samples."""
        return tuple(statistics.median(start.samples[metric]) for start in self.starts)


def encode(record: Record) -> bytes:
    """Return a record as JSON. Its summary is for people; `decode` ignores it."""
    summary = {name: metrics.summary(record.values(name)) for name in record.metrics}
    return records.encode({"schema": record.SCHEMA, **asdict(record), "summary": summary})


def write(path: Path, record: Record) -> None:
    """Replace the file of a record in one step. Raises OSError."""
    write_atomic(path, encode(record))


def read(path: Path, *, place: str) -> Record:
    """Read a record; `place` is its path in messages.

    Raises SettingsError for a file that is no record, is damaged, or is of a newer workspace.
    """
    try:
        return decode(read_regular(path))
    except OSError as exc:
        raise SettingsError(
            f"{place} cannot be read: {exc.strerror}", hint=f"ls -l {place}"
        ) from exc
    except NewerSchema as exc:
        raise SettingsError(f"{place} {exc}", hint="git pull") from exc
    except DecodeError as exc:
        if origin := _foreign(path):
            raise SettingsError(
                f"{path.name} is {origin}: it names neither machine nor tree, so it is no"
                " record here",
                hint=_MEASURE,
            ) from exc
        raise SettingsError(
            f"{place} is no complete record of a benchmark: {exc}", hint=_MEASURE
        ) from exc


def _foreign(path: Path) -> str | None:
    """Return which other program wrote a result file, None if no known one did.

    The file may hold one result, a list of results, or one result a line (--append-result).
    """
    content = read_regular(path)
    try:
        documents = [records.parse(content)]
    except DecodeError:
        try:
            documents = [records.parse(line) for line in content.splitlines() if line.strip()]
        except DecodeError:
            return None
    found = [each for part in documents for each in (part if isinstance(part, list) else [part])]
    origins = {_origin(each) for each in found}
    origin = origins.pop() if len(origins) == 1 else None
    return (
        f"{len(found)} results of {origin}"
        if origin and len(found) > 1
        else (f"a result of {origin}" if origin else None)
    )


def _origin(document: object) -> str | None:
    """Return the program that wrote a document with these keys."""
    keys = document.keys() if isinstance(document, dict) else set()
    return next((origin for origin, known in _ORIGINS.items() if known <= keys), None)


def decode(content: bytes) -> Record:
    """Parse a record. Raises DecodeError naming the fault and its place, or NewerSchema."""
    return records.decode(content, Record)


@dataclass(frozen=True)
class Entry:
    """A file below results/ with its record, or with the problem why it has none."""

    path: Path
    record: Record | None
    problem: str = ""


def record_path(layout: Layout, record: Record) -> Path:
    return layout.results / record.machine.name / f"{record.stem}.json"


def entries(layout: Layout) -> tuple[Entry, ...]:
    """Return every record, newest first and damaged files last."""
    found = [_entry(layout, path) for path in sorted(layout.results.glob("*/*.json"))]
    return tuple(
        sorted(
            found,
            key=lambda entry: instant(entry.record.time) if entry.record else 0.0,
            reverse=True,
        )
    )


def instant(time: str) -> float:
    """Return the seconds since 1970 of a record's time, 0 for an invalid time."""
    try:
        return datetime.datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def find(layout: Layout, name: str) -> Entry:
    """Return the record of a name: its path, file name, beginning of the file name, or label.

    Raises SettingsError where no record or several have the name, and for an unreadable record.
    """
    place = typed(name)
    if name.endswith(".json") and place.is_file():
        return Entry(place, read(place, place=name))
    paths = sorted(layout.results.glob("*/*.json"))
    matching = (
        [path for path in paths if path.stem == name]
        or [path for path in paths if path.stem.partition("-")[2] == name]
        or [path for path in paths if path.stem.startswith(name)]
    )
    if not name or not matching:
        raise SettingsError(
            f"there is no record {settings.shortened(name)!r}", hint=_hint_for(name, paths)
        )
    if len(matching) > 1:
        raise SettingsError(
            f"{name} matches {len(matching)} records",
            hint="give the path of one record",
            details=tuple(layout.relative(path) for path in matching),
        )
    return Entry(matching[0], read(matching[0], place=layout.relative(matching[0])))


def _hint_for(name: str, paths: Sequence[Path]) -> str:
    known = [known for path in paths for known in (path.stem, path.stem.partition("-")[2])]
    if alike := settings.nearest(name, known):
        return f"did you mean {alike}? {LIST}"
    return LIST if paths else "./scripts/nox -s bench    measures; there are no records yet"


def _entry(layout: Layout, path: Path) -> Entry:
    try:
        return Entry(path, read(path, place=layout.relative(path)))
    except SettingsError as exc:
        return Entry(path, None, exc.message)


def show_records(layout: Layout, *, console: Console, as_json: bool) -> None:
    """Print one row for each record: complete, interrupted or damaged, and its first metric."""
    found = entries(layout)
    if as_json:
        document = {"schema": 1, "records": [_document(layout, entry) for entry in found]}
        console.data(json.dumps(document, indent=1))
        return
    console.rows(_row(entry) for entry in found)
    if not found:
        console.info("there are no records of benchmarks yet")
    is_pair = sum(entry.record is not None for entry in found) > 1
    console.hint("./scripts/inv bench.compare A B" if is_pair else "./scripts/nox -s bench")


def counted_starts(count: int) -> str:
    """Return `1 start` or `2 starts`."""
    return f"{count} {'start' if count == 1 else 'starts'}"


def _row(entry: Entry) -> Row:
    if entry.record is None:
        return Row(State.FAIL, entry.path.stem, entry.problem)
    state = State.OK if entry.record.is_complete else State.WARN
    return Row(state, entry.record.stem, _line(entry.record))


def _line(record: Record) -> str:
    """Return a record in one line."""
    count = len(record.starts)
    starts = (
        counted_starts(count)
        if record.is_complete
        else f"{count} of {record.repeat} starts, interrupted"
    )
    return "  ".join(
        (
            record.kind,
            record.model,
            starts,
            *(measured_text(record, name) for name in record.metrics[:1]),
            record.time[:16].replace("T", " "),
            record.machine.name,
        )
    )


def measured_text(record: Record, name: str) -> str:
    """Return the median of a metric over the starts, with its unit and its variation."""
    values = record.values(name)
    spread = f" ± {metrics.variation(values):.1%}" if len(values) > 1 else ""
    return f"{name} {statistics.median(values):.4g} {metrics.known(name).unit}{spread}"


def _document(layout: Layout, entry: Entry) -> dict[str, object]:
    place, record = layout.relative(entry.path), entry.record
    if record is None:
        return {"path": place, "problem": entry.problem}
    return {
        "path": place,
        "kind": record.kind,
        "label": record.label,
        "tree": record.source.tree,
        "time": record.time,
        "machine": record.machine.name,
        "model": record.model,
        "starts": len(record.starts),
        "repeat": record.repeat,
        "medians": {name: statistics.median(record.values(name)) for name in record.metrics},
    }
