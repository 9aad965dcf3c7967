"""Records of benchmarks: their metrics and format, their files below results/, and their list.

Only a finite number above zero is a sample: a rate of zero means that no request was completed.
A record is one JSON document with the samples of each start of the process. A record that is
damaged, or that a newer workspace wrote, is refused.
"""

import datetime
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from workspace.core import hints, lock, records, settings
from workspace.core.console import Console, Row, State
from workspace.core.errors import SettingsError, counted
from workspace.core.files import read_regular
from workspace.core.paths import Layout, typed
from workspace.core.records import DecodeError, NewerSchema

Kind = Literal["latency", "throughput", "serve", "startup"]
Better = Literal["lower", "higher"]
# A label is part of a file name and of a command line.
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
# With a larger variation about forty starts are needed to settle a change of 5 %.
NOISY = 0.1


@dataclass(frozen=True)
class Metric:
    """A metric of vLLM's benchmarks; `unit` is the unit of its samples."""

    name: str
    unit: str
    better: Better
    meaning: str


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("latency", "s", "lower", "time for one batch of requests"),
        Metric("requests_per_second", "requests/s", "higher", "requests completed offline"),
        Metric("tokens_per_second", "tok/s", "higher", "tokens read and written offline"),
        Metric("cold_startup", "s", "lower", "start of the engine with empty caches"),
        Metric("cold_compilation", "s", "lower", "compilation with empty caches"),
        Metric("warm_startup", "s", "lower", "start of the engine with full caches"),
        Metric("warm_compilation", "s", "lower", "compilation with full caches"),
        Metric("request_throughput", "requests/s", "higher", "requests completed by the server"),
        Metric("output_throughput", "tok/s", "higher", "tokens written by the server"),
        Metric("ttft", "ms", "lower", "time to the first token of a request"),
        Metric("itl", "ms", "lower", "time between two tokens of a request"),
        Metric("tpot", "ms", "lower", "mean time for a token of a request after its first"),
        Metric("e2el", "ms", "lower", "time for a whole request"),
    )
}


def find_metric(name: str) -> Metric | None:
    """Return the metric of a name such as `ttft`, or `ttft@8` (8 requests at once); else None."""
    base, at, concurrency = name.partition("@")
    if at and not re.fullmatch(r"[1-9][0-9]{0,5}", concurrency):
        return None
    return METRICS.get(base)


def known(name: str) -> Metric:
    """Return the metric of a name in a record. Records have known names only."""
    found = find_metric(name)
    assert found is not None
    return found


def concurrency(name: str) -> int | None:
    """Return the requests at once of a sweep's metric, None for other metrics."""
    at = name.partition("@")[2]
    return int(at) if at else None


def variation(values: Sequence[float]) -> float:
    """Return the standard deviation over the mean, of two values or more."""
    return statistics.stdev(values) / statistics.fmean(values)


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
        if self.repeat < 1 or not LABEL.fullmatch(self.label) or not self.source.tree:
            raise DecodeError("repeat, label or source.tree is not what a benchmark writes")
        for index, start in enumerate(self.starts):
            for name, samples in start.samples.items():
                if find_metric(name) is None or not all(sample > 0 for sample in samples):
                    raise DecodeError(
                        f"starts[{index}].samples.{name} is not a metric with positive samples"
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

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """The metrics for a short list: of a sweep only those at the highest load."""
        top = max((concurrency(name) or 0 for name in self.metrics), default=0)
        return tuple(name for name in self.metrics if concurrency(name) in (None, top))

    def values(self, metric: str) -> tuple[float, ...]:
        """Return one value for each start, the unit of statistics: the median of its samples."""
        return tuple(statistics.median(start.samples[metric]) for start in self.starts)

    def is_noisy(self, metric: str) -> bool:
        """Return whether the starts differ too much for a verdict; unknown for one start."""
        return len(self.starts) > 1 and variation(self.values(metric)) > NOISY


@dataclass(frozen=True)
class ServeResult:
    """One run of `vllm bench serve`, as its --save-result writes it; times are medians in ms.

    It names no machine, no tree and no version, and no spread between runs.
    """

    date: str
    backend: str
    model_id: str
    num_prompts: int
    completed: int
    request_throughput: float
    request_rate: float | str = "inf"
    burstiness: float = 1.0
    max_concurrency: int | None = None
    total_input_tokens: int | None = None
    output_throughput: float | None = None
    median_ttft_ms: float | None = None
    median_itl_ms: float | None = None
    median_tpot_ms: float | None = None
    median_e2el_ms: float | None = None


@dataclass(frozen=True)
class ServeRuns:
    """Runs of `vllm bench serve` under one name, in a file or a folder: an arm of a comparison."""

    stem: str
    runs: tuple[ServeResult, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that all runs have, without those that no request gave a value."""
        return tuple(name for name in METRICS if all(self.values(name)))

    def values(self, metric: str) -> tuple[float, ...]:
        """Return one value for each run, 0 for a run that has none."""
        found = (vars(run) for run in self.runs)
        values = (one.get(metric, one.get(f"median_{metric}_ms")) or 0.0 for one in found)
        return tuple(value if math.isfinite(value) and value > 0 else 0.0 for value in values)


def serve_runs(name: str) -> ServeRuns | None:
    """Return the runs of `vllm bench serve` in a file, a run a line, or in the files of a folder;
    None where there are none. Raises SettingsError for a folder that has other JSON, too.
    """
    place = typed(name)
    is_file = name.endswith(".json") and place.is_file()
    # vLLM writes each result a second time, in PyTorch's form.
    inside = [path for path in sorted(place.glob("*.json")) if ".pytorch." not in path.name]
    found = {path: _serve_results(path) for path in ([place] if is_file else inside)}
    runs = [run for each in found.values() for run in each]
    if runs and (broken := next((path for path, each in found.items() if not each), None)):
        hint = hints.text("core.list_file", path=broken)
        raise SettingsError(f"{broken} is no result of `vllm bench serve`", hint=hint)
    return ServeRuns(name, tuple(runs)) if runs else None


def _serve_results(path: Path) -> list[ServeResult]:
    try:
        content = read_regular(path)
        try:
            documents = [records.parse(content)]
        except DecodeError:
            documents = [records.parse(line) for line in content.splitlines() if line.strip()]
        return [records.convert(document, ServeResult) for document in documents]
    except (OSError, DecodeError):
        return []


def read(path: Path, *, place: str) -> Record:
    """Read a record; `place` is its path in messages.

    Raises SettingsError for a file that is no record, is damaged, or is of a newer workspace.
    """
    try:
        return records.decode(read_regular(path), Record)
    except OSError as exc:
        raise SettingsError(
            f"{place} cannot be read: {exc.strerror}", hint=hints.text("core.list_file", path=place)
        ) from exc
    except NewerSchema as exc:
        raise SettingsError(
            f"{place} cannot be read: {exc}", hint=hints.text("bench.git_pull")
        ) from exc
    except DecodeError as exc:
        raise SettingsError(
            f"{place} is not a complete record of a benchmark: {exc}",
            hint=hints.text("bench.measure_again"),
        ) from exc


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
    if name.endswith(".json") and os.path.lexists(place):
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
            hint=hints.text("bench.path_of_record"),
            details=tuple(layout.relative(path) for path in matching),
        )
    return Entry(matching[0], read(matching[0], place=layout.relative(matching[0])))


def _hint_for(name: str, paths: Sequence[Path]) -> str:
    known = [known for path in paths for known in (path.stem, path.stem.partition("-")[2])]
    if alike := settings.nearest(name, known):
        return hints.text("bench.list_alike", alike=alike)
    return hints.text("inv.bench") if paths else hints.text("bench.nothing_measured")


def _entry(layout: Layout, path: Path) -> Entry:
    try:
        return Entry(path, read(path, place=layout.relative(path)))
    except SettingsError as exc:
        return Entry(path, None, exc.message)


def show_records(layout: Layout, *, console: Console, as_json: bool) -> None:
    """Print one row for each record: complete, interrupted or damaged, and its first metric."""
    found = entries(layout)
    if as_json:
        listed = [_document(layout, entry) for entry in found]
        console.document({"schema": 1, "records": listed})
        return
    console.stdout.rows(_row(entry) for entry in found)
    if not found:
        console.stdout.info("there are no records of benchmarks yet")
    is_pair = sum(entry.record is not None for entry in found) > 1
    console.stdout.hint(hints.text("bench.compare_two") if is_pair else hints.text("nox.bench"))


@dataclass(frozen=True)
class _Listed(Row):
    """A row of the list: name, metric, value, starts, and what was measured when."""

    measured: tuple[str, str, str] = ("", "", "")

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.name, *self.measured, self.text)


def _row(entry: Entry) -> Row:
    record = entry.record
    if record is None:
        return _Listed(State.FAIL, entry.path.stem, entry.problem)
    metric = next(iter(record.shown_metrics), "")
    starts, is_noisy = counted(len(record.starts), "start"), metric and record.is_noisy(metric)
    if not record.is_complete:
        starts = f"{len(record.starts)} of {record.repeat} starts, interrupted"
    return _Listed(
        State.OK if record.is_complete and not is_noisy else State.WARN,
        record.stem,
        f"{record.kind} of {record.model}, {record.time[:16].replace('T', ' ')},"
        f" {record.machine.name}",
        measured=(metric, metric and value_text(record, metric), starts),
    )


def value_text(record: Record, name: str) -> str:
    """Return the median of a metric over the starts, with its unit and its variation."""
    values = record.values(name)
    spread = f" ± {variation(values):.1%}" if len(values) > 1 else ""
    noisy = " noisy" if record.is_noisy(name) else ""
    return f"{statistics.median(values):.4g} {known(name).unit}{spread}{noisy}"


def relabel(layout: Layout, name: str, label: str, *, console: Console) -> None:
    """Give a record another label, and its file the name that belongs to it.

    Raises SettingsError for an invalid label, or one that another record of the tree has.
    """
    if not LABEL.fullmatch(label):
        raise SettingsError(
            f"{settings.shortened(label)!r} is no label of at most 64 letters, digits and . - + _",
            hint=hints.text("bench.label_example", record=name),
        )
    # A running benchmark adds starts to its record.
    with lock.hold(layout.lock, verb="inv bench.label"):
        entry = find(layout, name)
        assert entry.record
        record = replace(entry.record, label=label)
        path = entry.path.with_name(f"{record.stem}.json")
        if path == entry.path:
            console.row(State.OK, entry.record.stem, "has this label")
            return
        if os.path.lexists(path):
            raise SettingsError(
                f"{layout.relative(path)} exists: a record of this tree has the label {label}",
                hint=hints.text("inv.bench"),
            )
        records.write(path, record)
        entry.path.unlink()
    console.row(State.DONE, entry.record.stem, f"is now {layout.relative(path)}")


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
