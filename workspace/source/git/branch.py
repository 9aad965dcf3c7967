"""A branch with a working tree of its own, made from what may have to be fetched first."""

from pathlib import Path

from workspace.core.journal import Journal
from workspace.core.settings import Settings
from workspace.source.git.command import OnLine
from workspace.source.git.repository import Git

UPSTREAM = "refs/remotes/origin/main"


def is_name(git: Git, name: str) -> bool:
    """Whether git takes `name` for a branch (git-check-ref-format(1))."""
    return bool(name) and git.look("check-ref-format", "--branch", name, check=False).out.strip() == name


def fetch_main(git: Git, url: str, *, settings: Settings, journal: Journal, on_line: OnLine) -> None:
    """Fetch upstream's main as UPSTREAM. Raises SourceError."""
    git.fetch(url, (f"+refs/heads/main:{UPSTREAM}",), whole=False, settings=settings, journal=journal, on_line=on_line)


def add_worktree(git: Git, path: Path, commit: str, *, settings: Settings, journal: Journal, on_line: OnLine) -> None:
    """Make a working tree at `path`, HEAD detached at a commit; a partial clone fetches the contents of its files. Raises SourceError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    git.talk(("worktree", "add", "--force", "--detach", str(path.absolute()), commit), settings, journal, on_line)


def begin(worktree: Git, name: str, commit: str, *, journal: Journal) -> None:
    """Make the branch at a commit and check it out. Raises CheckoutError where there is one of that name."""
    worktree.write("checkout", "--quiet", "--no-track", "-b", name, commit, journal=journal)
