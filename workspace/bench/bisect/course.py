"""The course of a bisect: what was asked for, between which commits, and every try so far. One file, written anew after each try.

What follows from the tries is worked out from them each time, so that a bisect which was killed anywhere is gone on with by the same command.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from workspace.bench.bisect.search import Verdict
from workspace.core.errors import WorkspaceError
from workspace.core.files import read_regular, write_atomic
from workspace.core.layout import Layout

SCHEMA = 1
ABORT = "./scripts/nox -s bisect -- --abort"


@dataclass(frozen=True)
class Asked:
    """What the command line says. `factor` is as it was typed, `good` and `bad` are None where nothing was."""

    run: str
    good: str | None = None
    bad: str | None = None
    is_patches: bool = False
    timeout_s: float = 600.0
    factor: str = "5"

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        ends = [word for name, ref in (("--good", self.good), ("--bad", self.bad)) if ref for word in (name, ref)]
        usual = Asked(self.run)
        more = [*(["--timeout-s", f"{self.timeout_s:g}"] if self.timeout_s != usual.timeout_s else [])]
        more += ["--factor", self.factor] if self.factor != usual.factor else []
        return shlex.join(["./scripts/nox", "-s", "bisect", "--", *(["--patches"] if self.is_patches else ends), "--run", self.run, *more])


@dataclass(frozen=True)
class Try:
    """One commit, and what was found; `values` are what a benchmark measured, one a start."""

    commit: str
    verdict: Verdict
    evidence: str
    seconds: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Course:
    """`ground` is a digest of what the patches are on, and of the patches: tries on another ground say nothing of this one."""

    asked: Asked
    good: str
    bad: str
    ground: str
    tries: tuple[Try, ...] = ()

    @property
    def verdicts(self) -> dict[str, Verdict]:
        return {one.commit: one.verdict for one in self.tries}

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.tries)

    def of(self, commit: str) -> Try | None:
        """What is known of a commit."""
        return next((one for one in self.tries if one.commit == commit), None)

    def after(self, one: Try) -> "Course":
        return replace(self, tries=(*self.tries, one))

    def inheriting(self, former: "Course") -> "Course":
        """Take over what another course has found out, where it asked the same of the same; a benchmark is judged against its own good end."""
        same = [(one.asked.run, one.asked.timeout_s, one.asked.is_patches, one.ground) for one in (self, former)]
        return replace(self, tries=former.tries) if same[0] == same[1] and not any(one.values for one in former.tries) else self


def ground(base: str, patches: Sequence[Path]) -> str:
    """One SHA-256 over the commit that patches are on, their names and their content."""
    digest = hashlib.sha256(base.encode())
    for patch in patches:
        content = patch.read_bytes()
        digest.update(f"{patch.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def path_of(layout: Layout) -> Path:
    return layout.state / "bisect.json"


def write(layout: Layout, course: Course) -> None:
    write_atomic(path_of(layout), json.dumps({"schema": SCHEMA, **asdict(course)}, indent=1, allow_nan=False).encode())


def read(layout: Layout) -> Course | None:
    """Return the bisect that is under way, None where there is none. Raises WorkspaceError for one that cannot be read."""
    path = path_of(layout)
    try:
        return _course(json.loads(read_regular(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise WorkspaceError(f"{layout.relative(path)} is no bisect that can be gone on with: {exc}", hint=ABORT) from exc


def _course(document: Mapping[str, object]) -> Course:
    if document["schema"] != SCHEMA:
        raise ValueError(f"it has schema {document['schema']}, this workspace reads {SCHEMA}")
    asked, tries = document["asked"], document["tries"]
    assert isinstance(asked, dict)
    assert isinstance(tries, list)
    found = tuple(Try(**{**one, "values": tuple(one["values"])}) for one in tries)
    if any(one.verdict not in get_args(Verdict) for one in found):
        raise ValueError("it has a verdict that is none")
    return Course(Asked(**asked), str(document["good"]), str(document["bad"]), str(document["ground"]), found)
