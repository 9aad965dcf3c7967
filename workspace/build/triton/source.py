"""The tree that Triton is built from: vendor/triton at its pin, with patches/triton on it, and nothing of the user's that no patch holds."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from workspace.core.console import Step
from workspace.core.errors import BuildError, CheckoutError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.source import checkout, patches, pins
from workspace.source.git import Git

FROM_SOURCE = "./scripts/inv fix-triton --from-source"
# One CMake serves vLLM and Triton (requirements/build of the one, pyproject.toml of the other).
CMAKE = "cmake>=3.26.1,<4"
# setup.py asks for these by import or on PATH, and a build without isolation must have them.
_ALWAYS = ("setuptools", "wheel", "ninja")


@dataclass(frozen=True)
class Source:
    """A tree that may be built. `project` is the folder with its setup.py, the root or python/; `content` its tree OID, `patches` how many are on it."""

    tree: Path
    project: Path
    ref: str
    commit: str
    content: str
    patches: int


def prepare(layout: Layout, settings: Settings, *, journal: Journal, step: Step) -> Source:
    """Have vendor/triton at the pin with its patches on it, cloned where it is missing.

    Raises CheckoutError where it holds edits, commits that are no patches, or an operation under way; SourceError where it cannot be fetched.
    """
    pin = pins.load(layout.pins).triton
    there = checkout.ensure(layout, pin, settings, choice="git", journal=journal, step=step)
    stack = patches.apply(layout, "triton", pin, there, journal=journal)
    shown = layout.relative(layout.triton)
    if stack.dirty:
        raise CheckoutError(
            f"{shown} has edits of yours ({', '.join(stack.dirty[:3])}), which no patch holds; they are kept, and nothing was built",
            hint=f"git -C {shown} commit -a && ./scripts/inv patch.export --project triton    or: git -C {shown} stash; then {FROM_SOURCE}",
        )
    project = next((folder for folder in (layout.triton, layout.triton / "python") if (folder / "setup.py").is_file()), None)
    if project is None:
        raise BuildError(f"{shown} has no setup.py, neither in its root nor in python/", hint=f"git -C {shown} status; TRITON_MIRROR names where it came from")
    content = Git(layout.triton).tree("HEAD")
    step.reason = f"{pin.tag} {pin.commit[:12]}" + (f", {len(stack.names)} patches" if stack.names else "")
    return Source(layout.triton, project, pin.tag, pin.commit, content, len(stack.names))


def requirements(source: Source) -> tuple[str, ...]:
    """Return what the build needs in `.vllm`: the tree's own words (pyproject.toml, python/requirements.txt), but for CMake, which vLLM needs too."""
    lines: list[str] = []
    try:
        said = tomllib.loads((source.project / "pyproject.toml").read_text(encoding="utf-8"))
        lines += [str(line) for line in said.get("build-system", {}).get("requires", [])]
    except FileNotFoundError:
        pass
    except (ValueError, AttributeError) as exc:
        raise BuildError(f"pyproject.toml of Triton cannot be read: {exc}", hint=f"git -C {source.tree} status") from exc
    listed = source.tree / "python" / "requirements.txt"
    if listed.is_file():
        lines += [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if re.match(r"\s*[A-Za-z]", line)]
    named = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower(): line for line in (*_ALWAYS, *lines)}
    named["cmake"] = CMAKE
    return tuple(named[name] for name in sorted(named))
