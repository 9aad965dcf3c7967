"""Histories of commits in real git, made by one call of fast-import."""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Made:
    """A commit to make: its subject, and the files that it writes, or removes where None.

    Without parents it follows the commit before.
    """

    name: str
    files: Mapping[str, str | None]
    parents: Sequence[str] | None = None


def make(folder: Path, commits: Sequence[Made], *, onto: str | None = None) -> dict[str, str]:
    """Write the commits, the last as refs/heads/history, and return their OIDs by name.

    The first commit follows `onto`.
    """
    marks = {commit.name: number for number, commit in enumerate(commits, 1)}
    lines: list[str] = []
    before: list[str] = [onto] if onto else []
    for commit in commits:
        parents = (
            before
            if commit.parents is None
            else [f":{marks[name]}" if name in marks else name for name in commit.parents]
        )
        lines += [
            "commit refs/heads/history",
            f"mark :{marks[commit.name]}",
            f"committer Up <up@invalid> {1_700_000_000 + marks[commit.name]} +0000",
        ]
        lines += [f"data {len(commit.name)}", commit.name]
        lines += [
            f"{'merge' if index else 'from'} {parent}" for index, parent in enumerate(parents)
        ]
        for path, text in commit.files.items():
            lines += (
                [f"D {path}"]
                if text is None
                else [f"M 100644 inline {path}", f"data {len(text.encode())}", text]
            )
        lines.append("")
        before = [f":{marks[commit.name]}"]
    with tempfile.NamedTemporaryFile("r") as marked:
        argv = ["git", "fast-import", "--quiet", "--force", f"--export-marks={marked.name}"]
        subprocess.run(argv, cwd=folder, input="\n".join(lines).encode(), check=True)
        found = dict(line.split() for line in Path(marked.name).read_text().splitlines())
    return {name: found[f":{number}"] for name, number in marks.items()}
