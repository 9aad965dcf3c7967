"""One repository: its content, its state, and the few ways in which the workspace changes it."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import hints
from workspace.core.console import RunLog
from workspace.core.errors import CheckoutError
from workspace.core.settings import Settings
from workspace.repo.git import command
from workspace.repo.git.command import Command, OnLine, split

_HASHED_AT_ONCE = 500
_UNDER_WAY = {
    "rebase-apply/rebasing": "rebase",
    # Also where a kill left only the folder, which `git am --abort` removes.
    "rebase-apply": "am",
    "rebase-merge": "rebase",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
}


@dataclass(frozen=True)
class Place:
    """The repository that git finds for a path: git directory and top of the working tree.

    `present` are those of the `commits` given to `place` that it holds.
    """

    git_dir: Path
    top: Path
    head: str | None
    present: frozenset[str]


@dataclass(frozen=True)
class Gitlink:
    """A submodule's entry in the index of its superproject; `hidden` is the skip-worktree bit."""

    commit: str
    hidden: bool


NO_BLOBS = ("partialclonefilter", "blob:none")


@dataclass(frozen=True)
class Remote:
    """A remote repository, and the objects that a transfer from it needs."""

    url: str
    settings: Settings
    run_log: RunLog
    on_line: OnLine


class Git(Command):
    """A repository, given by the folder of its working tree."""

    def place(self, *commits: str) -> Place | None:
        """Find the repository, or None where the path is in none that has a working tree.

        `commits`, as 40 hex, are looked for in it; none is fetched. Raises ToolchainError for a
        wrapper of git whose output is not git's alone.
        """
        folders = ("--absolute-git-dir", "--show-toplevel")
        # A revision that names nothing is left out, and what follows it too.
        query = (*(f"--disambiguate={commit}" for commit in commits), *folders, "--revs-only")
        answer = self.look("rev-parse", *query, "HEAD^{commit}", check=False)
        if answer.status != 0:
            return None
        lines = answer.out.splitlines()
        start = next((at for at, line in enumerate(lines) if line.startswith("/")), len(lines))
        present, paths, head = lines[:start], lines[start : start + 2], lines[start + 2 :]
        if len(paths) != 2 or len(head) > 1 or not {*present} <= {*commits}:
            raise command.wrapped(lines)
        return Place(Path(paths[0]), Path(paths[1]), head[0] if head else None, frozenset(present))

    def path_of(self, name: str) -> Path:
        """Return where git keeps `name` (objects, index, modules/…).

        The repository may be a plain clone, a submodule or a linked worktree.
        """
        if name not in self._paths:
            query = ("rev-parse", "--path-format=absolute", "--git-path", name)
            self._paths[name] = Path(self.look(*query).out.rstrip("\n"))
        return self._paths[name]

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a revision names, as 40 hex, or None; never fetch it."""
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

    def resolve_all(self, *revisions: str) -> tuple[str | None, ...]:
        """Return what `resolve` returns for each revision, from one start of git."""
        names = "".join(f"{revision}^{{commit}}\n" for revision in revisions).encode()
        answers = self.pipe(names, "cat-file", "--batch-check=%(objectname)").decode().splitlines()
        # A name without an object is repeated, with a word behind it.
        return tuple(None if " " in answer else answer for answer in answers)

    def head(self) -> str | None:
        """Return the commit that is checked out, or None before the first commit."""
        return self.resolve("HEAD")

    def tree(self, commit: str) -> str:
        """Return the tree OID of a commit, as 40 hex."""
        return self.look(
            "rev-parse", "--verify", "--end-of-options", f"{commit}^{{tree}}"
        ).out.strip()

    def has_path(self, commit: str, path: str) -> bool:
        """Return whether the tree of a commit has a file or folder at `path`."""
        return self.look("cat-file", "-e", f"{commit}:{path}", check=False).status == 0

    def present(self, commits: Sequence[str]) -> frozenset[str]:
        """Return those of the given commits, as 40 hex, that the repository holds."""
        return frozenset(
            self.look(
                "rev-list", "--no-walk", "--ignore-missing", *commits, "--", check=False
            ).out.split()
        )

    def is_ancestor(self, ancestor: str, commit: str) -> bool:
        """Return whether `commit` is `ancestor` or one of its descendants."""
        return self.look("merge-base", "--is-ancestor", ancestor, commit, check=False).status == 0

    def has_own_commits(self, base: str, tip: str) -> bool:
        """Return whether base..tip has a commit that the workspace did not make."""
        return (
            set(
                self.look(
                    "log", "--no-show-signature", "--format=%ce", f"{base}..{tip}", "--"
                ).out.split("\n")
            )
            - {"", command.IDENTITY[1]}
            != set()
        )

    def under_way(self) -> str | None:
        """Return the git operation that waits to be continued or aborted, or None."""
        return operation_in(self.path_of("."))

    def edits(self) -> tuple[str, ...]:
        """Return the tracked paths whose content is not HEAD's, staged or not."""
        return tuple(sorted(path for _, path in self._status("no")))

    def changed_files(self, base: str, paths: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the paths, below `paths` if given, whose content differs between `base` and now.

        New files count, ignored files do not.
        """
        # Not `git diff`: it rewrites the index where a file was touched, in spite of
        # GIT_OPTIONAL_LOCKS.
        return changed_paths(self.entries(paths, base), self.entries(paths, None))

    def digest(self, paths: Sequence[str], *, commit: str | None = None) -> str:
        """Return the SHA-256 over sorted `mode oid path` of all files, or of those below `paths`.

        The files are those of `commit`, or the working content: edits, deletions and new files that
        are not ignored count as if they were committed.
        """
        return command.digest(self.entries(paths, commit))

    def patch_paths(self, patch: Path) -> tuple[str, ...]:
        """Return the paths that a patch file changes."""
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
        """Return a value of the repository's own configuration, or of the file `file`."""
        answer = self.look(
            "config", *(("--file", str(file)) if file else ("--local",)), "--get", key, check=False
        )
        return answer.out.rstrip("\n") if answer.status == 0 else None

    def gitlink(self, path: str) -> Gitlink | None:
        """Return the submodule entry at `path` in the index, or None where there is none."""
        for entry in split(self.look("ls-files", "-s", "-t", "-z", "--", path).out):
            tag, mode, oid, _ = entry.split("\t", 1)[0].split(" ")
            if mode == "160000":
                return Gitlink(oid, tag == "S")
        return None

    def init(self) -> None:
        """Make an empty repository without the user's template."""
        self._trusted = True
        self.write("init", "--quiet", "--template=")

    def commit_everything(self, message: str, *, date: str) -> str:
        """Commit every file, ignored files too, as the only commit of the repository.

        The same content gives the same SHA on every machine.
        """
        # A threshold of 1 streams all content into one pack: a third of the files, and no repack at
        # the user's first commit.
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
        """Make a reference name a commit; HEAD becomes detached."""
        if name == "HEAD" or self.resolve(name) != commit:
            self.write("update-ref", "--no-deref", "--create-reflog", name, commit)

    def set_refs(self, wanted: Mapping[str, str]) -> None:
        """Make references name commits, in this order."""
        for name, known in zip(wanted, self.resolve_all(*wanted), strict=True):
            if known != wanted[name]:
                self.write("update-ref", "--no-deref", "--create-reflog", name, wanted[name])

    def set_setting(self, key: str, value: str, *, run_log: RunLog | None = None) -> None:
        """Set a value of the repository's own configuration, unless it has that value already."""
        if self.setting(key) != value:
            self.write("config", "--local", key, value, run_log=run_log)

    def set_settings(self, wanted: Mapping[str, str], *, run_log: RunLog | None = None) -> None:
        """Set those of the repository's own settings that have another value."""
        listed = split(self.look("config", "--local", "--list", "-z", check=False).out)
        known = dict(entry.partition("\n")[::2] for entry in listed)
        for key, value in wanted.items():
            # git lists section and name in small letters, and what is between them as it is.
            section, *between, name = key.split(".")
            if known.get(".".join((section.lower(), *between, name.lower()))) != value:
                self.write("config", "--local", key, value, run_log=run_log)

    def hide(self, path: str, *, run_log: RunLog | None = None) -> None:
        """Set the skip-worktree bit of an index entry."""
        self.write("update-index", "--skip-worktree", "--", path, run_log=run_log)

    def read_index(self, commit: str) -> None:
        """Load a commit's tree into the index; no file changes."""
        self.write("read-tree", commit)

    def write_files(self, *paths: str) -> None:
        """Write the named files, or all files, as the index holds them."""
        self.write(
            "checkout-index",
            "--force",
            "--index",
            "--quiet",
            *(("--", *paths) if paths else ("--all",)),
        )

    def blob(self, oid: str) -> bytes:
        """Return the content of a blob."""
        return self.look("cat-file", "blob", oid).out.encode(errors="surrogateescape")

    def move_to(self, commit: str, *, before: str, run_log: RunLog) -> None:
        """Move the checkout from the commit `before`, which is HEAD, to another commit.

        Files that differ are written, all others and local edits stay.

        Raises CheckoutError, with nothing moved, where a file that git does not track, ignored or
        not, has the path of a file of the commit.
        """
        # All files of a copied clone count as edited until a refresh. With -q git would not report
        # an abandoned lock.
        self.write("update-index", "--refresh", check=False)
        self._refuse_files_in_the_way(before, commit)
        # HEAD moves last: otherwise files that a power cut left empty would count as the user's
        # edits.
        self.write("read-tree", "-m", "-u", "HEAD", commit, run_log=run_log)
        os.sync()
        # Not `reset --keep`: it takes a file that was a folder before for the user's. A branch that
        # is checked out moves along.
        self.write(
            "update-ref", "-m", "moved by the workspace", "HEAD", commit, before, run_log=run_log
        )

    def _refuse_files_in_the_way(self, before: str, commit: str) -> None:
        """Raise CheckoutError for a new file of `commit` whose path an untracked file has."""
        # read-tree would overwrite an ignored file (since git 2.34).
        flags = ("-r", "-z", "--name-only", "--no-renames", "--diff-filter=A")
        new = split(self.look("diff-tree", *flags, before, commit).out)
        if in_way := [
            path for path in new if (self.path / path).is_symlink() or (self.path / path).is_file()
        ]:
            raise CheckoutError(
                f"{in_way[0]} in {self.path} is in the way: git does not track it, and"
                f" {commit[:12]} has a file of that name; nothing was moved",
                hint=hints.text("repo.stash_in_way", folder=self.path, path=in_way[0]),
            )

    @property
    def is_partial(self) -> bool:
        """Whether the repository fetches contents from its remote as they are needed."""
        return self.setting("remote.origin.promisor") == "true"

    def fetch(self, remote: Remote, refspecs: Sequence[str], *, whole: bool) -> None:
        """Fetch all content where `whole`, else history without file contents.

        The URL becomes the remote `origin` where there is none. Raises SourceError, also where the
        remote is silent for a minute.
        """
        url = remote.url
        if (origin := self.setting("remote.origin.url")) is None:
            branches = "+refs/heads/*:refs/remotes/origin/*"
            self.set_settings({"remote.origin.url": url, "remote.origin.fetch": branches})
        # Only a remote with a name can serve later what a filter leaves out.
        if origin in (None, url):
            name = "origin"
        elif self.is_partial:
            # Without a filter git would refuse new trees of which it lacks files (fsckObjects).
            name, whole = f"fork-{hashlib.sha256(url.encode()).hexdigest()[:8]}", False
            settings = (("url", url), ("promisor", "true"), NO_BLOBS)
            self.set_settings({f"remote.{name}.{key}": value for key, value in settings})
        else:
            name, whole = url, True
        partial = () if whole else ("--filter=blob:none",)
        plain = ("--progress", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
        args = ("fetch", *plain, *partial, name, *refspecs)
        self.talk(args, remote.settings, remote.run_log, remote.on_line)

    def fetch_from(self, other: Path, refspec: str, *, run_log: RunLog | None = None) -> None:
        """Fetch from a repository on this disk, with all contents."""
        flags = ("--quiet", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
        # All protocols are switched off by default, also that of a local path.
        env = {"GIT_ALLOW_PROTOCOL": "file"}
        self.write("fetch", *flags, str(other.absolute()), refspec, env=env, run_log=run_log)

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
        """Return `mode oid` by path, of a commit or of the working content."""
        if commit is not None:
            return command.tree_entries(
                self.look("ls-tree", "-r", "-z", "--full-tree", commit, "--", *paths).out
            )
        entries = command.index_entries(self.look("ls-files", "-s", "-z", "--", *paths).out)
        changed = [path for code, path in self._status("all", paths) if code[1] != " "]
        modes = _file_modes(self.path, changed)
        hashed: list[str] = []
        for start in range(0, len(modes), _HASHED_AT_ONCE):
            hashed += self.look(
                "hash-object", "--", *list(modes)[start : start + _HASHED_AT_ONCE]
            ).out.split()
        for path in changed:
            entries.pop(path, None)
        return (
            entries
            | _link_entries(self.path, changed)
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


def _link_entries(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """Return the entries of paths that are symbolic links; git's own hashing would follow them."""
    entries = {}
    for path in paths:
        file = root / path
        if file.is_symlink():
            target = os.readlink(os.fsencode(file))
            entries[path] = (
                "120000 " + hashlib.sha1(b"blob %d\0" % len(target) + target).hexdigest()
            )
    return entries


def _file_modes(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """Return the modes of those paths that are regular files, not missing files or repositories."""
    files = {path: root / path for path in paths}
    return {
        path: "100755" if file.stat().st_mode & 0o100 else "100644"
        for path, file in files.items()
        if file.is_file() and not file.is_symlink()
    }


def changed_paths(before: command.Entries, now: command.Entries) -> tuple[str, ...]:
    """Return the paths whose entries differ, sorted."""
    return tuple(sorted(path for path in {*before, *now} if before.get(path) != now.get(path)))


def operation_in(git_dir: Path) -> str | None:
    return next((name for entry, name in _UNDER_WAY.items() if (git_dir / entry).exists()), None)


def untracked(git: Git) -> tuple[str, ...]:
    """Return the files that git does not track and the tree's own .gitignore does not name.

    The user's ignore rules do not count: they hide a file that another clone will lack.
    """
    return tuple(split(git.look("ls-files", "-o", "-z", "--exclude-per-directory=.gitignore").out))


def differing(
    git: Git, base: str, *, new_below: Sequence[str], is_wanted: Callable[[str], bool]
) -> tuple[str, ...]:
    """Return the paths that `is_wanted` and whose content or mode differs from `base`, sorted.

    Edits, deletions and commits count. New files that are not ignored count only below `new_below`:
    to list them everywhere takes ten times as long as the rest.
    """
    # diff-index must not refresh the index, so it reports touched files as changed; the contents of
    # those few are compared below.
    touched = git.look("diff-index", "--name-only", "-z", "--no-renames", base, "--").out
    new = git.look("ls-files", "--others", "--exclude-standard", "-z", "--", *new_below).out
    candidates = sorted({path for path in (*split(touched), *split(new)) if is_wanted(path)})
    return git.changed_files(base, candidates) if candidates else ()


def hooks_folder(git: Git) -> tuple[Path, bool]:
    """Return the folder from which git takes hooks, and whether it is this repository's alone.

    core.hooksPath may name a folder that other repositories use too.
    """
    hooks, common = git.look(
        "rev-parse", "--path-format=absolute", "--git-path", "hooks", "--git-common-dir"
    ).out.splitlines()
    return Path(hooks), Path(hooks).resolve().is_relative_to(Path(common).resolve())
