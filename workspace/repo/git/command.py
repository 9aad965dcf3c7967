"""Git command lines: GitPython, the environment and the time limit of each kind of call.

Read calls use the user's configuration, take no lock and never go online. Write calls ignore that
configuration. Calls to a remote use the user's configuration (insteadOf, proxies, credentials) and
never prompt.
"""

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from workspace.core import hints, lock, process
from workspace.core.console import RunLog
from workspace.core.errors import CheckoutError, SourceError, ToolchainError, WorkspaceError
from workspace.core.settings import Settings

if TYPE_CHECKING:
    import git as gitpython

Entries = Mapping[str, str]


def split(listing: str) -> list[str]:
    """Split a git listing that ends each entry with a zero byte."""
    return [entry for entry in listing.split("\0") if entry]


def tree_entries(listing: str) -> dict[str, str]:
    """Read `mode type oid<TAB>path` entries (git-ls-tree(1))."""
    entries = {}
    for entry in split(listing):
        meta, path = entry.split("\t", 1)
        mode, _, oid = meta.split(" ")
        entries[path] = f"{mode} {oid}"
    return entries


def index_entries(listing: str) -> dict[str, str]:
    """Read `mode oid stage<TAB>path` entries (git-ls-files(1))."""
    entries = {}
    for entry in split(listing):
        meta, path = entry.split("\t", 1)
        entries[path] = meta.rsplit(" ", 1)[0]
    return entries


def digest(entries: Entries) -> str:
    """Return the SHA-256 over sorted `mode oid path`."""
    text = "".join(f"{entries[path]} {path}\n" for path in sorted(entries))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


# What git prints when the program that it started (ssh, a helper) has printed the reason before.
_REASON_IS_ABOVE = re.compile(
    r"(fatal|error): (Could not read from remote repository|the remote end hung up|early EOF"
    r"|index-pack failed|fetch-pack: |protocol error|Could not fetch |could not fetch )"
)
_NO_REASON = re.compile(
    r"hint:|warning:|From |Receiving|Resolving|remote: (Counting|Compressing|Enumerating|Total)",
    re.IGNORECASE,
)


def first_line(err: str) -> str:
    """Return the line of git's stderr that names the failure, which may be another program's."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    faults = [line for line in lines if line.startswith(("fatal:", "error:"))]
    message = next((line for line in faults if not _REASON_IS_ABOVE.match(line)), "")
    if not message:
        before = lines[: lines.index(faults[0])] if faults else lines[:1]
        reasons = [line for line in before if not _NO_REASON.match(line)]
        message = (reasons or faults or lines or [""])[-1 if reasons else 0]
    return re.sub(r"^(fatal|error): ", "", message)


def refusal_of_disk(err: str) -> str | None:
    """Return the line of git's stderr that names a full or read-only disk, or None.

    Neither a patch nor the network is at fault then, whatever else follows.
    """
    full = re.compile(r"No space left|Out of diskspace|Read-only file system|quota exceeded")
    return next((line.strip() for line in err.splitlines() if full.search(line)), None)


IDENTITY = ("vLLM workspace", "workspace@invalid")
# A partial clone would fetch missing blobs during a read: git 2.44 has a switch against it, older
# versions are denied every transport.
OFFLINE = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_TERMINAL_PROMPT": "0"}
LOOKING = OFFLINE | {"GIT_OPTIONAL_LOCKS": "0", "GIT_ATTR_NOSYSTEM": "1"}
# Content is compared as it was written, so without the user's conversions. The user's ignore rules
# and trusted folders stay in force.
_LOOKING = (
    *("core.attributesFile=/dev/null", "core.autocrlf=false", "core.eol=lf", "core.safecrlf=false"),
    *("core.sparseCheckout=false", "core.fsmonitor=false"),
    *("core.symlinks=true", "core.ignoreCase=false", "diff.orderFile=/dev/null"),
    "log.follow=false",
    # The inode reveals a file that was replaced by another file of the same size and time.
    *("core.trustctime=true", "core.checkStat=default"),
    # The store of commits is a bare repository, always of the workspace's own making.
    "safe.bareRepository=all",
)
LOOKING_FLAGS = ("--literal-pathspecs", *(flag for setting in _LOOKING for flag in ("-c", setting)))
# A remote that sends less than this for a minute counts as gone (git-config(1),
# http.lowSpeedLimit).
PATIENCE = {"GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "60"}
# Settings that would change content, commits or speed. They override those of the user, of the
# system and of the checkout itself.
HARDENED: Mapping[str, str] = {
    "core.hooksPath": "/dev/null",
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "core.autocrlf": "false",
    "core.eol": "lf",
    "core.safecrlf": "false",
    "core.fsmonitor": "false",
    "core.trustctime": "true",
    "core.checkStat": "default",
    # Otherwise git marks each file that it writes as always unchanged.
    "core.ignoreStat": "false",
    "core.sparseCheckout": "false",
    "core.splitIndex": "false",
    "core.symlinks": "true",
    "core.ignoreCase": "false",
    "commit.gpgSign": "false",
    "tag.gpgSign": "false",
    "i18n.commitEncoding": "UTF-8",
    "fetch.prune": "false",
    "fetch.pruneTags": "false",
    "rerere.enabled": "false",
    "safe.bareRepository": "all",
    "submodule.recurse": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "advice.detachedHead": "false",
    # By default git does not sync loose objects and the index: after a power cut a reference would
    # name an empty file.
    "core.fsync": "all",
}


def git_environment(*, offline: bool = True) -> dict[str, str]:
    """Return the variables under which git writes the same bytes for every user.

    Offline, the configuration of the user and of the system is left out. Otherwise it stays,
    because remotes need it, and only `HARDENED` overrides it.
    """
    config = dict(HARDENED)
    variables = {
        "GIT_CONFIG_PARAMETERS": "",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_EDITOR": "true",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }
    for role in ("AUTHOR", "COMMITTER"):
        variables |= {f"GIT_{role}_NAME": IDENTITY[0], f"GIT_{role}_EMAIL": IDENTITY[1]}
    if offline:
        # The user's safe.directory is left out with the rest; Command.write checks it before, with
        # a read call.
        config["safe.directory"] = "*"
        variables |= OFFLINE | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    variables["GIT_CONFIG_COUNT"] = str(len(config))
    for index, (key, value) in enumerate(config.items()):
        variables |= {f"GIT_CONFIG_KEY_{index}": key, f"GIT_CONFIG_VALUE_{index}": value}
    return variables


# After these a git hangs: a version takes milliseconds, the status of vLLM from a cold disk
# seconds, the checkout of another release minutes.
VERSION_S = 30.0
LOOK_S = 120.0
WRITE_S = 1800.0
OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """Exit status, stdout and stderr of one git call."""

    status: int
    out: str
    err: str


class Command:
    """Git in one directory. Expected failures are raised as `failure`, with git's own first line.

    Raises ToolchainError where git is missing, is killed or has no disk space, and CheckoutError
    where git refuses a directory of another user.
    """

    def __init__(
        self,
        path: Path,
        *,
        git_dir: Path | None = None,
        failure: type[WorkspaceError] = CheckoutError,
    ) -> None:
        self.path = path.absolute()
        self._failure = failure
        self._extra = (
            {"GIT_DIR": str(git_dir.absolute()), "GIT_WORK_TREE": str(self.path)} if git_dir else {}
        )
        self._trusted = False
        # Where git keeps what, by name; this never changes.
        self._paths: dict[str, Path] = {}

    def look(self, *args: str, check: bool = True) -> Answer:
        """Run a git command that only reads: no lock, no network."""
        answer = self._git((*LOOKING_FLAGS, *args), LOOKING, check=check, limit_s=LOOK_S)
        # rev-parse fails where the user's safe.directory does not allow the folder.
        self._trusted |= args[0] == "rev-parse" and answer.status == 0
        return answer

    def write(
        self,
        *args: str,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        run_log: RunLog | None = None,
    ) -> Answer:
        """Run a git command that writes, immune to the user's configuration, offline."""
        if not self._trusted:
            self.look("rev-parse", "--git-dir")
        echo = shlex.join(["git", "-C", str(self.path), *args])
        with run_log.running(echo) if run_log else contextlib.nullcontext():
            variables = git_environment() | dict(env or {})
            return self._git(args, variables, check=check, limit_s=WRITE_S)

    def _git(
        self, args: Sequence[str], env: Mapping[str, str], *, check: bool, limit_s: float
    ) -> Answer:
        # A lock that a killed git left is removed, and the command that met it is run again.
        for _ in range(3):
            status, out, err = self._execute(args, env, limit_s)
            if status == 0 or not lock.remove_named(err, self.path):
                break
        answer = Answer(status, out.decode(errors="surrogateescape"), err)
        if status != 0:
            verb = _verb(args)
            self._raise_environment_failure(answer, verb)
            if check:
                self._raise_git_failure(answer, verb)
        return answer

    def pipe(self, text: bytes, *args: str) -> bytes:
        """Return the answer of a git command that only reads to a text on its standard input."""
        with tempfile.TemporaryFile() as file:
            file.write(text)
            file.seek(0)
            status, out, err = self._execute((*LOOKING_FLAGS, *args), LOOKING, LOOK_S, file)
        if status != 0:
            self._raise_git_failure(Answer(status, "", err), args[0])
        return out

    def _execute(
        self,
        args: Sequence[str],
        env: Mapping[str, str],
        limit_s: float,
        file: BinaryIO | None = None,
    ) -> tuple[int, bytes, str]:
        """Run git without a guard: it ends by itself, and what it writes appears whole."""
        program = _gitpython()
        from git.exc import GitCommandNotFound

        # GitPython would run in the caller's folder where the path is missing: -C fails.
        argv = ["-C", str(self.path), *args]
        try:
            with _bounded(_verb(args), limit_s):
                status, out, err = program().execute(
                    [executable(), *argv],
                    istream=file,
                    env={**self._extra, **env},
                    with_extended_output=True,
                    with_exceptions=False,
                    stdout_as_string=False,
                    strip_newline_in_stdout=False,
                )
        except GitCommandNotFound as exc:
            raise _unusable(exc) from exc
        return status, out, err

    def _raise_environment_failure(self, answer: Answer, verb: str) -> None:
        """Raise for a failure that is no answer of git: disk, owner of the folder, or a kill."""
        if refusal := refusal_of_disk(answer.err):
            raise ToolchainError(
                f"git in {self.path}: {refusal}",
                hint=hints.text("core.disk_and_rights", folder=self.path),
            )
        if found := re.search(r"dubious ownership in repository at '([^']*)'", answer.err):
            trust = hints.text("repo.trust", path=found[1])
            trust_or_own = hints.text("repo.trust_or_own", path=found[1])
            raise CheckoutError(
                f"{found[1]} belongs to another user than you, so git refuses to read it",
                # Root needs no file to be its own, and would take the clone from its user.
                hint=trust if os.geteuid() == 0 else trust_or_own,
            )
        if answer.status < 0:
            # It may have ended anywhere, so the status answers nothing.
            raise ToolchainError(
                f"git {verb} in {self.path} {process.describe_status(answer.status)}",
                hint=hints.text("repo.memory_again"),
            )

    def _raise_git_failure(self, answer: Answer, verb: str) -> NoReturn:
        """Raise the expected failure with git's own message."""
        failed = f"git {verb} in {self.path}"
        if found := re.search(r"Unable to create '([^']*\.lock)': File exists", answer.err):
            raise self._failure(
                f"{failed}: another git, or one that was killed, left {found[1]}",
                hint=hints.text("repo.delete_lock", path=found[1]),
            )
        raise self._failure(
            f"{failed}: {first_line(answer.err) or f'exited with {answer.status}'}",
            details=tuple(answer.err.splitlines()[1:10]),
        )

    def talk(
        self, args: Sequence[str], settings: Settings, run_log: RunLog, on_line: OnLine
    ) -> None:
        """Run a git command that contacts a remote, after removal of abandoned locks and packs.

        Each line of git's output goes to `on_line`. Raises SourceError.
        """
        self._remove_leftovers()
        places = (
            [f"--git-dir={self._extra['GIT_DIR']}", f"--work-tree={self.path}"]
            if "GIT_DIR" in self._extra
            else ["-C", str(self.path)]
        )
        hint = hints.text("repo.network_or_copy")
        try:
            process.run(
                [executable(), *places, *args],
                env=settings.child_environment("git", git_environment(offline=False) | PATIENCE),
                run_log=run_log,
                on_line=on_line,
                failure=SourceError,
                hint=hint,
            )
        except SourceError as exc:
            output = "\n".join(exc.details[:-1])
            failed = f"git {_verb(args)} in {self.path}"
            if refusal := refusal_of_disk(output):
                hint = hints.text("core.disk_of", folder=self.path)
                raise ToolchainError(
                    f"{failed}: {refusal}", hint=hint, details=exc.details
                ) from exc
            reason = first_line(output) or exc.message
            raise SourceError(f"{failed}: {reason}", hint=hint, details=exc.details) from exc

    def _remove_leftovers(self) -> None:
        """Remove what a killed git left in the git directory and among its packs."""
        # A submodule's own git directory is inside that of the superproject.
        folders = self.look(
            "rev-parse",
            "--path-format=absolute",
            "--absolute-git-dir",
            "--git-path",
            "objects/pack",
            check=False,
        )
        if folders.status == 0:
            git_dir, packs = map(Path, folders.out.splitlines())
            lock.remove_at_top(git_dir, self.path)
            lock.remove_packs(packs, self.path)


def _verb(args: Sequence[str]) -> str:
    """Return the git subcommand of the arguments."""
    return next(arg for arg in args if not arg.startswith("-") and "=" not in arg)


def executable() -> str:
    """Return the git program. Raises ToolchainError where git is missing."""
    return _gitpython().GIT_PYTHON_GIT_EXECUTABLE or "git"


@functools.cache
def _gitpython() -> "type[gitpython.Git]":
    """Return GitPython's command interface, imported late because the import takes 0.1 s.

    Raises ToolchainError where git is missing, fails, or does not answer.
    """
    try:
        # The import runs `git version`.
        with _bounded("version", VERSION_S):
            import git as gitpython
    except ImportError as exc:
        raise _unusable(exc) from exc
    return gitpython.Git


@contextlib.contextmanager
def _bounded(verb: str, limit_s: float) -> Iterator[None]:
    """Kill git, and what it started, after `limit_s` seconds. Raises NoAnswer.

    GitPython has a limit for some of its calls, and kills git without what a wrapper started,
    which keeps the output open. Every other program that a verb starts has a guard, in a process
    group of its own.
    """
    is_over = threading.Event()

    def end() -> None:
        import psutil

        is_over.set()
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(child.pid) == os.getpgrp():
                    for each in (*child.children(recursive=True), child):
                        each.kill()

    watchdog = threading.Timer(limit_s, end)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    except Exception:
        if not is_over.is_set():
            raise
    finally:
        watchdog.cancel()
    if is_over.is_set():
        raise process.NoAnswer(f"{shutil.which('git')} {verb} gave no answer in {limit_s:g} s")


def _unusable(exc: Exception) -> ToolchainError:
    """Return the error for a git that is missing, or that is there and fails."""
    path, status = shutil.which("git"), getattr(exc.__cause__, "status", None)
    if path is None or not isinstance(status, int):
        hint = hints.text("machine.apt_git")
        return ToolchainError("git is missing or cannot be started", hint=hint)
    found = re.search(r"'(.*)'", str(getattr(exc.__cause__, "stderr", "")), re.DOTALL)
    output = f": {first_line(found[1])}" if found else ""
    again, look = hints.text("repo.memory_again"), hints.text("core.list_file", path=path)
    return ToolchainError(
        f"{path} {process.describe_status(status)}{output}", hint=again if status < 0 else look
    )


def wrapped(lines: Sequence[str]) -> ToolchainError:
    """Return the error for a wrapper of git that prints before git does."""
    path = shutil.which("git")
    return ToolchainError(
        f"{path} prints something else before its answer: {next(iter(lines), '')!r}",
        hint=hints.text("core.list_file", path=path),
    )
