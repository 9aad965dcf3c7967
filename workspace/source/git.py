"""The one door to git: every flag, every environment variable and GitPython itself stay in this module.

Looking honours the user's configuration, takes no lock and never goes online. Writing is immune to that configuration.
Only what talks to a remote keeps the user's configuration (insteadOf, proxies, credentials), without prompts.
"""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workspace.core import process
from workspace.core.errors import CheckoutError, SourceError, ToolchainError, WorkspaceError
from workspace.core.journal import Journal
from workspace.core.settings import Settings
from workspace.source import content, hardening, leftover
from workspace.source.content import first_line, refusal_of_disk, split

if TYPE_CHECKING:
    import git as gitpython

_HASHED_AT_ONCE = 500
OnLine = Callable[[str], None]
_UNDER_WAY = {
    "rebase-apply/applying": "am",
    "rebase-apply": "rebase",
    "rebase-merge": "rebase",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
}

# One `am` for a whole series; see the git facts in the design: nothing here may depend on who applies, where and when.
_AM = (
    *("am", "--quiet", "--3way", "--patch-format=mbox", "--keep-non-patch", "--keep-cr", "--no-scissors", "--no-signoff", "--no-gpg-sign"),
    *("--no-message-id", "--whitespace=nowarn", "--committer-date-is-author-date"),
)
# The same in the hands of a person who resolves a conflict.
AM_BY_HAND = "am --3way --keep-non-patch --keep-cr --no-scissors --committer-date-is-author-date"


@dataclass(frozen=True)
class Place:
    """Where git finds the repository of a path: its own directory and the top of its working tree."""

    git_dir: Path
    top: Path


@dataclass(frozen=True)
class Gitlink:
    """A submodule's entry in the index of its superproject. `hidden`: the skip-worktree bit is set."""

    commit: str
    hidden: bool


@dataclass(frozen=True)
class Applied:
    """What one `am` of a series led to: the last commit, or the place of the conflict, counted from 1."""

    tip: str | None
    position: int = 0
    conflicted: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Answer:
    status: int
    out: str
    err: str


class Git:
    """Git in one directory. Expected failures are raised as `failure`, with git's own first line.

    Raises ToolchainError where git is missing and CheckoutError where git refuses a directory that belongs to someone else.
    """

    def __init__(self, path: Path, *, git_dir: Path | None = None, objects: Path | None = None, failure: type[WorkspaceError] = CheckoutError) -> None:
        self.path = path.absolute()
        self._failure = failure
        self._extra = {"GIT_DIR": str(git_dir.absolute()), "GIT_WORK_TREE": str(self.path)} if git_dir else {}
        if objects:
            self._extra["GIT_OBJECT_DIRECTORY"] = str(objects.absolute())
        self._trusted = False

    # Looking

    def place(self) -> Place | None:
        """Find the repository, or None where the path is in none that has a working tree."""
        answer = self._look("rev-parse", "--absolute-git-dir", "--show-toplevel", check=False)
        lines = answer.out.splitlines()
        return Place(Path(lines[0]), Path(lines[1])) if answer.status == 0 and len(lines) == 2 else None

    def path_of(self, name: str) -> Path:
        """Where git keeps `name` (objects, index, modules/…), be this a plain clone, a submodule or a linked worktree."""
        return Path(self._look("rev-parse", "--path-format=absolute", "--git-path", name).out.rstrip("\n"))

    def resolve(self, revision: str) -> str | None:
        """The commit that a revision names, as 40 hex, or None. A commit that a partial clone lacks is not fetched."""
        return self._look("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", check=False).out.strip() or None

    def head(self) -> str | None:
        """The commit that is checked out, or None before the first one."""
        return self.resolve("HEAD")

    def tree(self, commit: str) -> str:
        """The tree OID of a commit, as 40 hex."""
        return self._look("rev-parse", "--verify", "--end-of-options", f"{commit}^{{tree}}").out.strip()

    def present(self, commits: Sequence[str]) -> frozenset[str]:
        """Those of the given commits, as 40 hex, that the repository holds."""
        return frozenset(self._look("rev-list", "--no-walk", "--ignore-missing", *commits, "--", check=False).out.split())

    def is_ancestor(self, ancestor: str, commit: str) -> bool:
        return self._look("merge-base", "--is-ancestor", ancestor, commit, check=False).status == 0

    def slugs(self, base: str, tip: str) -> tuple[str, ...]:
        """The subjects in base..tip as patch file names spell them, oldest first."""
        return tuple(self._look("log", "--reverse", "--no-show-signature", "--format=%f", f"{base}..{tip}", "--").out.split())

    def under_way(self) -> str | None:
        """Name the operation that waits to be continued or aborted, or None."""
        folder = Path(self._look("rev-parse", "--absolute-git-dir").out.strip())
        return next((name for entry, name in _UNDER_WAY.items() if (folder / entry).exists()), None)

    def edits(self) -> tuple[str, ...]:
        """Tracked paths whose content is not HEAD's, staged or not."""
        return tuple(sorted(path for _, path in self._status("no")))

    def changed_files(self, base: str, paths: Sequence[str] = ()) -> tuple[str, ...]:
        """Paths, below `paths` if given, that differ between the commit `base` and the working tree, new and not ignored ones included."""
        # Not `git diff`: it rewrites the index where a file was touched, whatever GIT_OPTIONAL_LOCKS says.
        before, now = self.entries(paths, base), self.entries(paths, None)
        return tuple(sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path)))

    def digest(self, paths: Sequence[str], *, commit: str | None = None) -> str:
        """Return the SHA-256 over sorted `mode oid path` of all files below `paths`, or of all files.

        Of `commit`, or of the working content: what is edited, deleted or new and not ignored counts as if it were committed.
        """
        return content.digest(self.entries(paths, commit))

    def patch_paths(self, patch: Path) -> tuple[str, ...]:
        """The paths that a patch file changes."""
        return tuple(sorted({entry.split("\t", 2)[2] for entry in split(self._look("apply", "--numstat", "-z", str(patch), check=False).out)}))

    def setting(self, key: str, *, file: Path | None = None) -> str | None:
        """A value of the repository's own configuration, or of the configuration file `file`."""
        answer = self._look("config", *(("--file", str(file)) if file else ("--local",)), "--get", key, check=False)
        return answer.out.rstrip("\n") if answer.status == 0 else None

    def gitlink(self, path: str) -> Gitlink | None:
        """The submodule entry at `path` in the index, or None where there is none."""
        for entry in split(self._look("ls-files", "-s", "-t", "-z", "--", path).out):
            tag, mode, oid, _ = entry.split("\t", 1)[0].split(" ")
            if mode == "160000":
                return Gitlink(oid, tag == "S")
        return None

    def tree_after(self, base: str, patches: Sequence[Path]) -> str | None:
        """Work out the tree that `base` with all patches would have, touching neither files nor the repository; None on a conflict.

        Follows `am`: a patch that applies as it stands is taken so, else by a three-way merge.
        """
        with tempfile.TemporaryDirectory(prefix="workspace-index-") as folder:
            os.mkdir(f"{folder}/objects")
            aside = {"GIT_INDEX_FILE": f"{folder}/index", "GIT_OBJECT_DIRECTORY": f"{folder}/objects"}
            aside["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(self.path_of("objects"))

            def applies(*words: str) -> bool:
                return self._write("apply", "--cached", "--whitespace=nowarn", *words, env=aside, check=False).status == 0

            self._write("read-tree", base, env=aside)
            if patches and not applies(*map(str, patches)) and not all(applies(str(patch)) or applies("--3way", str(patch)) for patch in patches):
                return None
            return self._write("write-tree", "--missing-ok", env=aside).out.strip()

    # Writing

    def init(self) -> None:
        """Make an empty repository without anyone's template."""
        self._trusted = True
        self._write("init", "--quiet", "--template=")

    def commit_everything(self, message: str, *, date: str) -> str:
        """Commit every file, ignored ones too, as the only commit of the repository; the same content gives the same SHA everywhere."""
        # A threshold of 1 streams all content into one pack: a third of the files, and no repacking at the user's first commit.
        self._write("-c", "core.bigFileThreshold=1", "-c", "core.compression=1", "add", "--all", "--force", ".")
        tree = self._write("write-tree").out.strip()
        commit = self._write("commit-tree", "-m", message, tree, env={"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}).out.strip()
        self.set_ref("HEAD", commit)
        return commit

    def set_ref(self, name: str, commit: str) -> None:
        """Let a reference name a commit; HEAD is detached."""
        if name == "HEAD" or self.resolve(name) != commit:
            self._write("update-ref", "--no-deref", "--create-reflog", name, commit)

    def set_setting(self, key: str, value: str, *, journal: Journal | None = None) -> None:
        """Set a value of the repository's own configuration, unless it is so already."""
        if self.setting(key) != value:
            self._write("config", "--local", key, value, journal=journal)

    def hide(self, path: str, *, journal: Journal | None = None) -> None:
        """Set the skip-worktree bit of an index entry."""
        self._write("update-index", "--skip-worktree", "--", path, journal=journal)

    def read_index(self, commit: str) -> None:
        """Let the index hold a commit's tree; no file is touched."""
        self._write("read-tree", commit)

    def write_files(self, *paths: str) -> None:
        """Write the named files, or every one, as the index holds them."""
        self._write("checkout-index", "--force", "--index", "--quiet", *(("--", *paths) if paths else ("--all",)))

    def blob(self, oid: str) -> bytes:
        return self._look("cat-file", "blob", oid).out.encode(errors="surrogateescape")

    def move_to(self, commit: str, *, journal: Journal) -> None:
        """Move the checkout to a commit: files that differ are written, all others and local edits stay, or nothing is done."""
        # All files of a clone that was copied count as edited until a refresh.
        self._write("update-index", "-q", "--refresh", check=False)
        # HEAD goes last: files that a power cut left empty would under it be taken for the user's edits.
        self._write("read-tree", "-m", "-u", "HEAD", commit)
        os.sync()
        self._write("reset", "--quiet", "--keep", commit, journal=journal)

    def applied(self, base: str, patches: Sequence[Path], *, scratch: Path) -> Applied:
        """Make the commits of a series on `base` in one `am`, in the empty folder `scratch`: no file and no ref here is touched.

        The commits lie in this repository's objects afterwards. The same input gives the same SHAs, whoever runs it.
        """
        aside = Git(scratch / "tree", git_dir=scratch / "git", objects=self.path_of("objects"))
        aside.path.mkdir()
        aside.init()
        # `am` needs the files of a merge, never of a patch that applies as it stands: they are written only when that failed.
        for with_files in (False, True):
            aside.set_ref("HEAD", base)
            aside.read_index(base)
            if with_files:
                aside.write_files()
            if aside._write(*_AM, *map(str, patches), check=False).status == 0:
                return Applied(aside.head())
            state = scratch / "git" / "rebase-apply"
            position = int(state.joinpath("next").read_text()) if state.joinpath("next").exists() else 1
            conflicted = {entry.split("\t", 1)[1] for entry in split(aside._look("ls-files", "-u", "-z").out)}
            aside._write("am", "--quit", check=False)
            shutil.rmtree(aside.path)
            aside.path.mkdir()
        return Applied(None, position, tuple(sorted(conflicted)) or self.patch_paths(patches[position - 1]))

    # Remotes

    def fetch(self, url: str, refspecs: Sequence[str], *, whole: bool, settings: Settings, journal: Journal, on_line: OnLine) -> None:
        """Fetch from `url`: history without file contents, or all of it where `whole`. It becomes the remote `origin` where there is none.

        Raises SourceError, also where the remote is silent for a minute.
        """
        if (origin := self.setting("remote.origin.url")) is None:
            self.set_setting("remote.origin.url", url)
            self.set_setting("remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*")
        # Only a remote with a name can be asked later for what a filter leaves out.
        remote, whole = ("origin", whole) if origin in (None, url) else (url, True)
        partial = () if whole else ("--filter=blob:none",)
        plain = ("--progress", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
        self._talk(("fetch", *plain, *partial, remote, *refspecs), settings, journal, on_line)

    def check_out(self, commit: str, *, settings: Settings, journal: Journal, on_line: OnLine) -> None:
        """Write a commit's files and detach HEAD at it; a partial clone fetches their contents. Raises SourceError."""
        self._talk(("checkout", "--progress", "--force", "--detach", commit), settings, journal, on_line)

    def _talk(self, words: Sequence[str], settings: Settings, journal: Journal, on_line: OnLine) -> None:
        leftover.remove_at_top(Path(self._extra.get("GIT_DIR", self.path / ".git")), self.path)
        places = [f"--git-dir={self._extra['GIT_DIR']}", f"--work-tree={self.path}"] if "GIT_DIR" in self._extra else ["-C", str(self.path)]
        process.run(
            [executable().GIT_PYTHON_GIT_EXECUTABLE or "git", *places, *words],
            env=settings.child_environment("plain", hardening.environment(offline=False) | hardening.PATIENCE),
            journal=journal,
            on_line=on_line,
            failure=SourceError,
            hint="check the network and run the same command again, or take the release archive: ./scripts/inv bootstrap --source release",
        )

    # How

    def _look(self, *words: str, check: bool = True) -> _Answer:
        return self._git((*hardening.LOOKING_FLAGS, *words), hardening.LOOKING, check=check, said=words)

    def _write(self, *words: str, env: Mapping[str, str] | None = None, check: bool = True, journal: Journal | None = None) -> _Answer:
        if not self._trusted:
            self._look("rev-parse", "--git-dir")
            self._trusted = True
        if journal:
            journal.command(shlex.join(["git", "-C", str(self.path), *words]))
        return self._git(words, hardening.environment() | dict(env or {}), check=check, said=words)

    def _git(self, words: Sequence[str], env: Mapping[str, str], *, check: bool, said: Sequence[str]) -> _Answer:
        program = executable()
        # GitPython would run in the caller's folder where the path is missing: -C fails instead.
        argv = [program.GIT_PYTHON_GIT_EXECUTABLE or "git", "-C", str(self.path), *words]
        from git.exc import GitCommandNotFound

        # A lock that a killed git left is removed, and the command that met it run again.
        for _ in range(3):
            try:
                status, out, err = program().execute(
                    argv,
                    env={**self._extra, **env},
                    with_extended_output=True,
                    with_exceptions=False,
                    stdout_as_string=False,
                    strip_newline_in_stdout=False,
                )
            except GitCommandNotFound as exc:
                raise _missing() from exc
            if status == 0 or not leftover.remove_named(err, self.path):
                break
        answer = _Answer(status, out.decode(errors="surrogateescape"), err)
        if status != 0:
            self._explain(answer, said, check=check)
        return answer

    def _explain(self, answer: _Answer, said: Sequence[str], *, check: bool) -> None:
        if refusal := refusal_of_disk(answer.err):
            raise ToolchainError(f"git in {self.path}: {refusal}", hint=f"df -h {self.path}; ls -ld {self.path}")
        if found := re.search(r"dubious ownership in repository at '([^']*)'", answer.err):
            place = shlex.quote(found[1])
            raise CheckoutError(
                f"{found[1]} belongs to another user than you, so git refuses to look into it",
                hint=f"sudo chown -R $(id -un) {place}    or, to trust it as it is: git config --global --add safe.directory {place}",
            )
        if not check:
            return
        verb = next(word for word in said if not word.startswith("-") and "=" not in word)
        what = f"git {verb} in {self.path}"
        if found := re.search(r"Unable to create '([^']*\.lock)': File exists", answer.err):
            hint = f"when no other git runs there: rm {shlex.quote(found[1])}"
            raise self._failure(f"{what}: another git, or one that was killed, left {found[1]}", hint=hint)
        raise self._failure(f"{what}: {first_line(answer.err) or f'exited with {answer.status}'}", details=tuple(answer.err.splitlines()[1:10]))

    def entries(self, paths: Sequence[str], commit: str | None) -> content.Entries:
        """`mode oid` by path, of a commit or of the working content."""
        if commit is not None:
            return content.tree_entries(self._look("ls-tree", "-r", "-z", "--full-tree", commit, "--", *paths).out)
        entries = content.index_entries(self._look("ls-files", "-s", "-z", "--", *paths).out)
        changed = [path for code, path in self._status("all", paths) if code[1] != " "]
        modes = content.file_modes(self.path, changed)
        hashed: list[str] = []
        for start in range(0, len(modes), _HASHED_AT_ONCE):
            hashed += self._look("hash-object", "--", *list(modes)[start : start + _HASHED_AT_ONCE]).out.split()
        for path in changed:
            entries.pop(path, None)
        return entries | content.link_entries(self.path, changed) | {path: f"{mode} {oid}" for (path, mode), oid in zip(modes.items(), hashed, strict=True)}

    def _status(self, untracked: Literal["no", "all"], paths: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
        for entry in split(self._look("status", "--porcelain=v1", "-z", "--no-renames", f"--untracked-files={untracked}", "--", *paths).out):
            yield entry[:2], entry[3:]


def executable() -> "type[gitpython.Git]":
    """GitPython's command interface, imported late: it costs 0.1 s. Raises ToolchainError where there is no git."""
    try:
        import git as gitpython
    except ImportError as exc:
        raise _missing() from exc
    return gitpython.Git


def advertised(url: str, names: Sequence[str], *, cwd: Path, settings: Settings, timeout_s: float) -> Mapping[str, str]:
    """Ask a remote for references: name to OID, an annotated tag's commit under `NAME^{}`.

    git itself has no connect time-out: a probe that does not answer within `timeout_s` seconds is ended with all its children.
    Raises SourceError where the remote cannot be reached.
    """
    argv = [executable().GIT_PYTHON_GIT_EXECUTABLE or "git", "ls-remote", "--", url, *names]
    environment = settings.child_environment("plain", hardening.environment(offline=False))
    hint = "check the network, or set VLLM_MIRROR to a copy that can be reached"
    try:
        reply = process.capture(argv, cwd=cwd, env=environment, timeout_s=timeout_s)
    except ToolchainError:
        raise SourceError(f"{without_user(url)} gave no answer in {timeout_s:g} s (CONNECT_TIMEOUT_S)", hint=hint) from None
    if reply.returncode != 0:
        raise SourceError(f"{without_user(url)} cannot be read: {first_line(reply.stderr) or process.describe_status(reply.returncode)}", hint=hint)
    return {name: oid for oid, name in (line.split("\t", 1) for line in reply.stdout.splitlines() if "\t" in line)}


def without_user(url: str) -> str:
    """A URL as it may be shown: without name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


def _missing() -> ToolchainError:
    return ToolchainError("git is not there, or cannot be started", hint="sudo apt install git")
