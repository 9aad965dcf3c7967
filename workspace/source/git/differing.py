"""Which files differ from a commit, where the whole tree is asked and next to nothing differs."""

from collections.abc import Callable, Sequence

from workspace.source.content import split
from workspace.source.git.repository import Git


def changed(git: Git, base: str, *, new_below: Sequence[str], is_wanted: Callable[[str], bool]) -> tuple[str, ...]:
    """Paths of the tree that `is_wanted` and that differ from `base` in content or mode: committed, edited, deleted.

    New and not ignored ones are looked for below `new_below` only: listing them everywhere costs ten times as much as all the rest.
    """
    # It takes what was touched for changed, as it must not refresh the index; contents are compared for those few.
    touched = git.look("diff-index", "--name-only", "-z", "--no-renames", base, "--").out
    new = git.look("ls-files", "--others", "--exclude-standard", "-z", "--", *new_below).out
    candidates = sorted({path for path in (*split(touched), *split(new)) if is_wanted(path)})
    return git.changed_files(base, candidates) if candidates else ()
