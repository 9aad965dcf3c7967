"""What git keeps an eye on below a folder of a checkout. It only looks."""

from workspace.source.git.repository import Git


def is_tracked(git: Git, path: str) -> bool:
    """Whether any file at or below `path`, relative to the checkout, is in the index."""
    return bool(git.look("ls-files", "-z", "--", path).out)
