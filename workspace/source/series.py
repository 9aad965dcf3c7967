"""The order of the patches on one pin: `patches/<project>/series`."""

import re
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import PatchDrift
from workspace.core.files import read_regular

FILE = "series"
_BASE = re.compile(r"# base: ([0-9a-f]{40})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_SHOWN = 200
# The line with which format-patch begins each message (git-format-patch(1), DISCUSSION).
_MESSAGE = re.compile(rb"^From [0-9a-f]{40} Mon Sep 17 00:00:00 2001$", re.MULTILINE)


@dataclass(frozen=True)
class Series:
    """The commit that the patches are for, and their file names in the order of application."""

    base: str
    names: tuple[str, ...]


def read(folder: Path, *, pin: str) -> Series:
    """Read a series and look at its patches. `pin` is the pinned commit, which the base line must name.

    Raises PatchDrift for a file that is not of its form, and where series, patches and pin do not fit together.
    """
    shown = f"patches/{folder.name}/{FILE}"
    try:
        # Not splitlines: what an editor shows as one line may hold form feeds and Unicode's separators.
        lines = read_regular(folder / FILE).decode().split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise PatchDrift(f"{shown} cannot be read: {reason}", hint=f"git checkout -- {shown}") from exc
    bases = [found[1] for line in lines if (found := _BASE.fullmatch(line.strip()))]
    if len(bases) != 1:
        raise PatchDrift(f"{shown} has {len(bases)} lines `# base: <40 hex>`, expected one", hint=f"git checkout -- {shown}")
    if bases[0] != pin:
        raise PatchDrift(
            f"{shown} is for base {bases[0]}, pinned is {pin}",
            hint=f"git log --oneline -3 -- vendor/pins.toml patches/{folder.name}    shows which of the two moved",
        )
    names: list[str] = []
    for number, line in enumerate(lines, 1):
        name = line.split("#", 1)[0].strip()
        if not name:
            continue
        place = f"{shown}, line {number}"
        if not _NAME.fullmatch(name) or not name.endswith(".patch"):
            shown_name = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")
            raise PatchDrift(f"{place}: {shown_name} is not the name of a .patch file in patches/{folder.name}", hint="one file name a line, without a folder")
        if name in names:
            raise PatchDrift(f"{place}: {name} stands there a second time", hint="take one of the two lines out; two patches of one name need better subjects")
        _look_at(folder / name, place)
        names.append(name)
    return Series(bases[0], tuple(names))


def _look_at(patch: Path, place: str) -> None:
    shown = f"patches/{patch.parent.name}/{patch.name}"
    try:
        content = read_regular(patch)
    except FileNotFoundError:
        raise PatchDrift(f"{place}: {shown} is not there", hint=f"git checkout -- {shown}    or take the line out of the series") from None
    except OSError as exc:
        raise PatchDrift(f"{shown} cannot be read: {exc.strerror}", hint=f"ls -l {shown}") from exc
    messages = len(_MESSAGE.findall(content))
    if messages != 1 or not content.startswith(b"From ") or b"\ndiff --git " not in content:
        raise PatchDrift(
            f"{shown} is not a mail of git format-patch with one commit in it",
            hint="make it with git format-patch --zero-commit -1 in the tree that has the commit",
        )
