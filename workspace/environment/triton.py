"""Which Triton is in `.vllm`, from where, and which one the installed torch pairs with. Read from what describes the packages; no Python is started."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from workspace.core.layout import Layout
from workspace.environment import interpreter, torch

# As an index gave it; from a wheel file, as inv fix-triton --from-source does it; from a source tree that stays its place.
Origin = Literal["index", "file", "editable"]


@dataclass(frozen=True)
class Installed:
    """A Triton. `place` is the file or tree that it came from, empty for an index; `package` its folder `triton`, None where that is gone."""

    version: str
    origin: Origin
    place: str
    package: Path | None

    @property
    def is_meant(self) -> bool:
        """Whether somebody put it there on purpose: an index's came because something asked for it."""
        return self.origin != "index"

    @property
    def bin(self) -> Path | None:
        """The folder of its assemblers; None where it has none."""
        folder = self.package / "backends" / "nvidia" / "bin" if self.package else None
        return folder if folder and folder.is_dir() else None


def observe(layout: Layout) -> Installed | None:
    """Look at the Triton in `.vllm`; None where none is described there."""
    version = interpreter.installed(layout).get("triton")
    if version is None:
        return None
    for folder in interpreter.site_packages(layout):
        described = folder / f"triton-{version}.dist-info"
        if described.is_dir():
            origin, place = _origin(described)
            # Triton's own layouts: its package lay and lies below python/.
            roots = (Path(place) / "python", Path(place)) if origin == "editable" else (folder,)
            package = next((root / "triton" for root in roots if (root / "triton" / "__init__.py").is_file()), None)
            return Installed(version, origin, place, package)
    return Installed(version, "index", "", None)


def paired(layout: Layout) -> str | None:
    """Return the versions that the installed torch asks for, such as `==3.7.1`, empty for any; None where it asks for none, as a CPU build."""
    there = interpreter.installed(layout)
    return torch.demands(layout, "torch", there).get("triton") if "torch" in there else None


def kept(layout: Layout) -> tuple[str, ...]:
    """Return the override that keeps a Triton which was put there on purpose, whatever torch asks for; nothing for an index's."""
    there = observe(layout)
    return (f"triton=={there.version}",) if there and there.is_meant else ()


def _origin(described: Path) -> tuple[Origin, str]:
    """What an installer notes of a package that came from no index (PEP 610)."""
    try:
        said = json.loads((described / "direct_url.json").read_text(encoding="utf-8"))
        place = unquote(urlsplit(str(said["url"])).path)
        return ("editable" if said.get("dir_info", {}).get("editable") else "file"), place
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "index", ""
