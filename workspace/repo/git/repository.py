"""One repository: what is in it, and the few ways in which the workspace changes it."""

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core.errors import CheckoutError
from workspace.core.log import RunLog
from workspace.core.settings import Settings
from workspace.repo.git import command
from workspace.repo.git.command import Command, OnLine, split

_HASHED_AT_ONCE = 500
_UNDER_WAY = {
    "rebase-apply/rebasing": "rebase",
    # Also where a kill left no more than the folder, which `git am --abort` takes away.
    "rebase-apply": "am",
    "rebase-merge": "rebase",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
}


@dataclass(frozen=True)
class Place:
    """Where git finds the repository of a path: its own directory and the top of its working
    tree.
    """

    git_dir: Path
    top: Path


@dataclass(frozen=True)
class Gitlink:
    """A submodule's entry in the index of its superproject. `hidden`: the skip-worktree bit is
    set.
    """

    commit: str
    hidden: bool


class Git(Command):
    """A repository, by the folder of its working tree."""

    # Looking

    def place(self) -> Place | None:
        """Find the repository, or None where the path is in none that has a working tree."""
        answer = self.look("rev-parse", "--absolute-git-dir", "--show-toplevel", check=False)
        lines = answer.out.splitlines()
        return (
            Place(Path(lines[0]), Path(lines[1]))
            if answer.status == 0 and len(lines) == 2
            else None
        )

    def path_of(self, name: str) -> Path:
        """Where git keeps `name` (objects, index, modules/…), be this a plain clone, a submodule or
        a linked worktree.
        """
        return Path(
            self.look("rev-parse", "--path-format=absolute", "--git-path", name).out.rstrip("\n")
        )

    def resolve(self, revision: str) -> str | None:
        """The commit that a revision names, as 40 hex, or None. A commit that a partial clone lacks
        is not fetched.
        """
        return (
            self.look(
                "rev-parse",
                "--verify",
                "--quiet",
                "--end-of-options",
                f"{revision}^{{commit}}",
                check=False,
            ).out.strip()
            or None
        )

    def head(self) -> str | None:
        """The commit that is checked out, or None before the first one."""
        return self.resolve("HEAD")

    def tree(self, commit: str) -> str:
        """The tree OID of a commit, as 40 hex."""
        return self.look(
            "rev-parse", "--verify", "--end-of-options", f"{commit}^{{tree}}"
        ).out.strip()

    def present(self, commits: Sequence[str]) -> frozenset[str]:
        """Those of the given commits, as 40 hex, that the repository holds."""
        return frozenset(
            self.look(
                "rev-list", "--no-walk", "--ignore-missing", *commits, "--", check=False
            ).out.split()
        )

    def have_common_history(self, one: str, other: str) -> bool:
        return self.look("merge-base", one, other, check=False).status == 0

    def is_ancestor(self, ancestor: str, commit: str) -> bool:
        return self.look("merge-base", "--is-ancestor", ancestor, commit, check=False).status == 0

    def has_own_commits(self, base: str, tip: str) -> bool:
        """Whether anybody but the workspace has made a commit of base..tip."""
        return (
            set(
                self.look(
                    "log", "--no-show-signature", "--format=%ce", f"{base}..{tip}", "--"
                ).out.split("\n")
            )
            - {"", command.IDENTITY[1]}
            != set()
        )

    def slugs(self, base: str, tip: str) -> tuple[str, ...]:
        """The subjects in base..tip as patch file names spell them, oldest first."""
        return tuple(
            self.look(
                "log", "--reverse", "--no-show-signature", "--format=%f", f"{base}..{tip}", "--"
            ).out.split()
        )

    def under_way(self) -> str | None:
        """Name the operation that waits to be continued or aborted, or None."""
        return _operation(Path(self.look("rev-parse", "--absolute-git-dir").out.rstrip("\n")))

    def standing(self, commit: str) -> tuple[str | None, str]:
        """What `under_way` and `tree` say, from one start of git."""
        folder, tree = (
            self.look("rev-parse", "--absolute-git-dir", f"{commit}^{{tree}}")
            .out.rstrip("\n")
            .rsplit("\n", 1)
        )
        return _operation(Path(folder)), tree

    def edits(self) -> tuple[str, ...]:
        """Tracked paths whose content is not HEAD's, staged or not."""
        return tuple(sorted(path for _, path in self._status("no")))

    def changed_files(self, base: str, paths: Sequence[str] = ()) -> tuple[str, ...]:
        """Paths, below `paths` if given, that differ between the commit `base` and the working
        tree, new and not ignored ones included.
        """
        # Not `git diff`: it rewrites the index where a file was touched, whatever
        # GIT_OPTIONAL_LOCKS says.
        before, now = self.entries(paths, base), self.entries(paths, None)
        return tuple(
            sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
        )

    def digest(self, paths: Sequence[str], *, commit: str | None = None) -> str:
        """Return the SHA-256 over sorted `mode oid path` of all files below `paths`, or of all
        files.

        Of `commit`, or of the working content: what is edited, deleted or new and not ignored
        counts as if it were committed.
        """
        return command.digest(self.entries(paths, commit))

    def patch_paths(self, patch: Path) -> tuple[str, ...]:
        """The paths that a patch file changes."""
        return tuple(
            sorted(
                {
                    entry.split("\t", 2)[2]
                    for entry in split(
                        self.look("apply", "--numstat", "-z", str(patch), check=False).out
                    )
                }
            )
        )

    def setting(self, key: str, *, file: Path | None = None) -> str | None:
        """A value of the repository's own configuration, or of the configuration file `file`."""
        answer = self.look(
            "config", *(("--file", str(file)) if file else ("--local",)), "--get", key, check=False
        )
        return answer.out.rstrip("\n") if answer.status == 0 else None

    def gitlink(self, path: str) -> Gitlink | None:
        """The submodule entry at `path` in the index, or None where there is none."""
        for entry in split(self.look("ls-files", "-s", "-t", "-z", "--", path).out):
            tag, mode, oid, _ = entry.split("\t", 1)[0].split(" ")
            if mode == "160000":
                return Gitlink(oid, tag == "S")
        return None

    def tree_after(self, base: str, patches: Sequence[Path]) -> str | None:
        """Work out the tree that `base` with all patches would have, touching neither files nor the
        repository; None on a conflict.

        Follows `am`: a patch that applies as it stands is taken so, else by a three-way merge.
        """
        with tempfile.TemporaryDirectory(prefix="workspace-index-") as folder:
            os.mkdir(f"{folder}/objects")
            scratch = {
                "GIT_INDEX_FILE": f"{folder}/index",
                "GIT_OBJECT_DIRECTORY": f"{folder}/objects",
            }
            scratch["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(self.path_of("objects"))

            def applies(*words: str) -> bool:
                return (
                    self.write(
                        "apply", "--cached", "--whitespace=nowarn", *words, env=scratch, check=False
                    ).status
                    == 0
                )

            self.write("read-tree", base, env=scratch)
            if (
                patches
                and not applies(*map(str, patches))
                and not all(
                    applies(str(patch)) or applies("--3way", str(patch)) for patch in patches
                )
            ):
                return None
            return self.write("write-tree", "--missing-ok", env=scratch).out.strip()

    # Writing

    def init(self) -> None:
        """Make an empty repository without anyone's template."""
        self._trusted = True
        self.write("init", "--quiet", "--template=")

    def commit_everything(self, message: str, *, date: str) -> str:
        """Commit every file, ignored ones too, as the only commit of the repository; the same
        content gives the same SHA everywhere.
        """
        # A threshold of 1 streams all content into one pack: a third of the files, and no repacking
        # at the user's first commit.
        self.write(
            "-c",
            "core.bigFileThreshold=1",
            "-c",
            "core.compression=1",
            "add",
            "--all",
            "--force",
            ".",
        )
        tree = self.write("write-tree").out.strip()
        commit = self.write(
            "commit-tree",
            "-m",
            message,
            tree,
            env={"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date},
        ).out.strip()
        self.set_ref("HEAD", commit)
        return commit

    def set_ref(self, name: str, commit: str) -> None:
        """Let a reference name a commit; HEAD is detached."""
        if name == "HEAD" or self.resolve(name) != commit:
            self.write("update-ref", "--no-deref", "--create-reflog", name, commit)

    def set_setting(self, key: str, value: str, *, run_log: RunLog | None = None) -> None:
        """Set a value of the repository's own configuration, unless it is so already."""
        if self.setting(key) != value:
            self.write("config", "--local", key, value, run_log=run_log)

    def hide(self, path: str, *, run_log: RunLog | None = None) -> None:
        """Set the skip-worktree bit of an index entry."""
        self.write("update-index", "--skip-worktree", "--", path, run_log=run_log)

    def read_index(self, commit: str) -> None:
        """Let the index hold a commit's tree; no file is touched."""
        self.write("read-tree", commit)

    def write_files(self, *paths: str) -> None:
        """Write the named files, or every one, as the index holds them."""
        self.write(
            "checkout-index",
            "--force",
            "--index",
            "--quiet",
            *(("--", *paths) if paths else ("--all",)),
        )

    def blob(self, oid: str) -> bytes:
        return self.look("cat-file", "blob", oid).out.encode(errors="surrogateescape")

    def move_to(self, commit: str, *, run_log: RunLog) -> None:
        """Move the checkout to a commit: files that differ are written, all others and local edits
        stay, or nothing is done.

        Raises CheckoutError where a file that git does not track, ignored or not, lies where the
        commit has one.
        """
        # All files of a clone that was copied count as edited until a refresh. With -q it would not
        # say that a lock was left.
        self.write("update-index", "--refresh", check=False)
        before = self.look("rev-parse", "--verify", "HEAD").out.strip()
        # read-tree would write over a file that is ignored (since git 2.34).
        new = split(
            self.look(
                "diff-tree",
                "-r",
                "-z",
                "--name-only",
                "--no-renames",
                "--diff-filter=A",
                before,
                commit,
            ).out
        )
        if in_way := [
            path for path in new if (self.path / path).is_symlink() or (self.path / path).is_file()
        ]:
            raise CheckoutError(
                f"{in_way[0]} in {self.path} is in the way: git does not track it, and"
                f" {commit[:12]} has a file of that name; nothing was moved",
                hint=(
                    f"mv {shlex.quote(str(self.path / in_way[0]))}"
                    f" {shlex.quote(str(self.path / in_way[0]) + '.mine')}    and the same command"
                    " again"
                ),
            )
        # HEAD goes last: files that a power cut left empty would under it be taken for the user's
        # edits.
        self.write("read-tree", "-m", "-u", "HEAD", commit, run_log=run_log)
        os.sync()
        # Not `reset --keep`: it takes a file that was a folder before for the user's. A branch that
        # is checked out moves along.
        self.write(
            "update-ref", "-m", "moved by the workspace", "HEAD", commit, before, run_log=run_log
        )

    # Remotes

    def fetch(
        self,
        url: str,
        refspecs: Sequence[str],
        *,
        whole: bool,
        settings: Settings,
        run_log: RunLog,
        on_line: OnLine,
    ) -> None:
        """Fetch from `url`: history without file contents, or all of it where `whole`. It becomes
        the remote `origin` where there is none.

        Raises SourceError, also where the remote is silent for a minute.
        """
        if (origin := self.setting("remote.origin.url")) is None:
            self.set_setting("remote.origin.url", url)
            self.set_setting("remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*")
        # Only a remote with a name can be asked later for what a filter leaves out.
        remote, whole = ("origin", whole) if origin in (None, url) else (url, True)
        partial = () if whole else ("--filter=blob:none",)
        plain = ("--progress", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
        self.talk(("fetch", *plain, *partial, remote, *refspecs), settings, run_log, on_line)

    def check_out(
        self, commit: str, *, settings: Settings, run_log: RunLog, on_line: OnLine
    ) -> None:
        """Write a commit's files and detach HEAD at it; a partial clone fetches their contents.
        Raises SourceError.
        """
        self.talk(
            ("checkout", "--progress", "--force", "--detach", commit), settings, run_log, on_line
        )

    def entries(self, paths: Sequence[str], commit: str | None) -> command.Entries:
        """`mode oid` by path, of a commit or of the working content."""
        if commit is not None:
            return command.tree_entries(
                self.look("ls-tree", "-r", "-z", "--full-tree", commit, "--", *paths).out
            )
        entries = command.index_entries(self.look("ls-files", "-s", "-z", "--", *paths).out)
        changed = [path for code, path in self._status("all", paths) if code[1] != " "]
        modes = command.file_modes(self.path, changed)
        hashed: list[str] = []
        for start in range(0, len(modes), _HASHED_AT_ONCE):
            hashed += self.look(
                "hash-object", "--", *list(modes)[start : start + _HASHED_AT_ONCE]
            ).out.split()
        for path in changed:
            entries.pop(path, None)
        return (
            entries
            | command.link_entries(self.path, changed)
            | {
                path: f"{mode} {oid}"
                for (path, mode), oid in zip(modes.items(), hashed, strict=True)
            }
        )

    def _status(
        self, untracked: Literal["no", "all"], paths: Sequence[str] = ()
    ) -> Iterator[tuple[str, str]]:
        for entry in split(
            self.look(
                "status",
                "--porcelain=v1",
                "-z",
                "--no-renames",
                f"--untracked-files={untracked}",
                "--",
                *paths,
            ).out
        ):
            yield entry[:2], entry[3:]


def _operation(git_dir: Path) -> str | None:
    return next((name for entry, name in _UNDER_WAY.items() if (git_dir / entry).exists()), None)


@dataclass(frozen=True)
class Move:
    """The newest entry of HEAD's reflog: what git calls it, the commit before it, and whether a
    verb of the workspace made it.
    """

    what: str
    before: str
    is_ours: bool


def last_move(git: Git) -> Move | None:
    """The last move of HEAD, or None where git keeps no such record, or only that of one commit."""
    words = (
        "log",
        "--walk-reflogs",
        "-2",
        "--no-show-signature",
        "--no-color",
        "--format=%H%x00%ge%x00%gs",
        "HEAD",
        "--",
    )
    entries = [line.split("\0") for line in git.look(*words, check=False).out.splitlines()]
    if len(entries) != 2 or any(len(entry) != 3 for entry in entries):
        return None
    (_, by, what), (before, _, _) = entries
    return Move(what, before, by == command.IDENTITY[1])


def take_in(made: Path, objects: Path) -> None:
    """Put loose objects into a repository, each with its content on the disk before it has its
    name.

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
        for target, scratch in begun.items():
            os.replace(scratch, target)
        os.sync()


def is_tracked(git: Git, path: str) -> bool:
    """Whether any file at or below `path`, relative to the checkout, is in the index."""
    return bool(git.look("ls-files", "-z", "--", path).out)


def differing(
    git: Git, base: str, *, new_below: Sequence[str], is_wanted: Callable[[str], bool]
) -> tuple[str, ...]:
    """Paths of the tree that `is_wanted` and that differ from `base` in content or mode: committed,
    edited, deleted.

    New and not ignored ones are looked for below `new_below` only: listing them everywhere costs
    ten times as much as all the rest.
    """
    # It takes what was touched for changed, as it must not refresh the index; contents are compared
    # for those few.
    touched = git.look("diff-index", "--name-only", "-z", "--no-renames", base, "--").out
    new = git.look("ls-files", "--others", "--exclude-standard", "-z", "--", *new_below).out
    candidates = sorted({path for path in (*split(touched), *split(new)) if is_wanted(path)})
    return git.changed_files(base, candidates) if candidates else ()


def hooks_folder(git: Git) -> tuple[Path, bool]:
    """Return the folder from which git takes hooks, and whether it is this repository's alone:
    core.hooksPath may name one that others use too.
    """
    hooks, common = git.look(
        "rev-parse", "--path-format=absolute", "--git-path", "hooks", "--git-common-dir"
    ).out.splitlines()
    return Path(hooks), Path(hooks).resolve().is_relative_to(Path(common).resolve())
