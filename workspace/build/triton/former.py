"""The Triton that was in `.vllm` before another one is put there: kept by hard links, put back file by file, without a network.

What an installer removes are names; the files live on here until `drop`.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workspace.core import process
from workspace.core.files import write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter

_LIST = "files.json"


@dataclass(frozen=True)
class Former:
    """A kept Triton; `version` is None where there was none."""

    folder: Path
    version: str | None


def keep(layout: Layout) -> Former:
    """Keep the files of the installed Triton. What is kept already, of a run that was killed, is the one to go back to."""
    folder = layout.environment / ".workspace" / "former-triton"
    if (folder / _LIST).is_file():
        return _known(folder)
    shutil.rmtree(folder, ignore_errors=True)
    version = interpreter.installed(layout).get("triton")
    names = list(_listed(layout, version)) if version else []
    (folder / "files").mkdir(parents=True)
    for number, path in enumerate(names):
        os.link(layout.environment / path, folder / "files" / str(number), follow_symlinks=False)
    # Last: without it nothing was changed yet.
    write_atomic(folder / _LIST, json.dumps({"version": version, "files": names}).encode())
    return Former(folder, version)


def is_kept(layout: Layout) -> bool:
    """Whether a run that was killed has left the one to go back to."""
    return (layout.environment / ".workspace" / "former-triton" / _LIST).is_file()


def put_back(layout: Layout, settings: Settings, one: Former, *, journal: Journal) -> None:
    """Take out what is there now, and put every file of the former one back to its place."""
    if "triton" in interpreter.installed(layout):
        argv: list[process.Argument] = [interpreter.uv(layout), "pip", "uninstall", "--python", layout.environment_python, "triton"]
        process.run(argv, env=settings.child_environment("plain"), cwd=layout.root, journal=journal)
    names = json.loads((one.folder / _LIST).read_text(encoding="utf-8"))["files"]
    for number, path in enumerate(names):
        place = layout.environment / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        os.link(one.folder / "files" / str(number), place, follow_symlinks=False)
    drop(one)


def drop(one: Former) -> None:
    """Forget a former one: another is proven, or it is back."""
    (one.folder / _LIST).unlink(missing_ok=True)
    shutil.rmtree(one.folder, ignore_errors=True)


def _known(folder: Path) -> Former:
    return Former(folder, json.loads((folder / _LIST).read_text(encoding="utf-8"))["version"])


def _listed(layout: Layout, version: str) -> Iterator[str]:
    """The files that the installer has listed, below `.vllm`; those that are gone are nobody's."""
    for packages in interpreter.site_packages(layout):
        record = packages / f"triton-{version}.dist-info" / "RECORD"
        if record.is_file():
            with record.open(encoding="utf-8", newline="") as file:
                for row in csv.reader(file):
                    place = Path(os.path.normpath(packages / row[0])) if row else packages
                    if place.is_relative_to(layout.environment) and (place.is_file() or place.is_symlink()):
                        yield str(place.relative_to(layout.environment))
