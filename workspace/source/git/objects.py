"""Objects that were made in a folder of their own, brought into a repository."""

import os
import shutil
from pathlib import Path


def take_in(made: Path, objects: Path) -> None:
    """Put loose objects into a repository, each with its content on the disk before it has its name.

    One that a power cut has emptied git would take for there ever after, and never write again.
    """
    begun: dict[Path, Path] = {}
    for file in made.glob("??/*"):
        target = objects / file.parent.name / file.name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            # Named so that git prunes what a kill leaves.
            begun[target] = target.with_name(f"tmp_obj_{file.name[:12]}")
            begun[target].unlink(missing_ok=True)
            shutil.copy(file, begun[target])
    if begun:
        os.sync()
        for target, aside in begun.items():
            os.replace(aside, target)
        os.sync()
