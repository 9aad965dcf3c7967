"""TOML that a user writes: a table, or a sentence with the way to mend it."""

import tomllib
from pathlib import Path

from workspace.core.errors import SettingsError
from workspace.core.files import read_regular


def read(path: Path, *, place: str) -> dict[str, object]:
    """Return the table of a file, which is called `place` in what is said of it. Raises SettingsError where it cannot be read or is no TOML."""
    try:
        return tomllib.loads(read_regular(path).decode())
    except OSError as exc:
        raise SettingsError(f"{place} cannot be read: {exc.strerror}", hint=f"ls -l {place}") from exc
    except (ValueError, RecursionError) as exc:
        raise SettingsError(f"{place} is not TOML: {exc}", hint=f"${{EDITOR:-nano}} {place}") from exc
