"""The records that are there: results/<machine>/<tree>-<label>.json, and which of them a word on a command line means."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from workspace.bench import record
from workspace.bench.record import Record
from workspace.core import settings
from workspace.core.errors import SettingsError
from workspace.core.layout import Layout

LIST = "./scripts/inv bench"


@dataclass(frozen=True)
class Entry:
    """A file below results/, and its record or the sentence that says why there is none."""

    path: Path
    record: Record | None
    problem: str = ""


def path_of(layout: Layout, one: Record) -> Path:
    return layout.results / one.machine.name / f"{one.stem}.json"


def entries(layout: Layout) -> tuple[Entry, ...]:
    """Every record, newest first; what is damaged comes last."""
    found = [_entry(layout, path) for path in sorted(layout.results.glob("*/*.json"))]
    return tuple(sorted(found, key=lambda entry: instant(entry.record.time) if entry.record else 0.0, reverse=True))


def instant(time: str) -> float:
    """Seconds since 1970 of a record's time, 0 where it is none."""
    try:
        return datetime.datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def find(layout: Layout, word: str) -> Entry:
    """Return the record that a word means: a path, the name of its file, the beginning of that, or a label.

    Raises SettingsError where none or several are meant, and for one that cannot be read.
    """
    place = Path(word)
    if word.endswith(".json") and place.is_file():
        return Entry(place, record.read(place, place=word))
    there = sorted(layout.results.glob("*/*.json"))
    stems = [path for path in there if path.stem == word]
    meant = stems or [path for path in there if path.stem.partition("-")[2] == word] or [path for path in there if path.stem.startswith(word)]
    if not word or not meant:
        alike = settings.nearest(word, [name for path in there for name in (path.stem, path.stem.partition("-")[2])])
        hint = f"did you mean {alike}? {LIST}" if alike else LIST if there else "./scripts/nox -s bench    measures; there are no records yet"
        raise SettingsError(f"there is no record {settings.shortened(word)!r}", hint=hint)
    if len(meant) > 1:
        raise SettingsError(f"{word} may be any of {len(meant)} records", hint="say which one", details=tuple(layout.relative(path) for path in meant))
    return Entry(meant[0], record.read(meant[0], place=layout.relative(meant[0])))


def _entry(layout: Layout, path: Path) -> Entry:
    try:
        return Entry(path, record.read(path, place=layout.relative(path)))
    except SettingsError as exc:
        return Entry(path, None, exc.message)
