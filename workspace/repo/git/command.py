"""How git is called: GitPython itself, and under which variables git looks, writes and talks.

Looking honours the user's configuration, takes no lock and never goes online. Writing is immune to
that configuration. Only what talks to a remote keeps the user's configuration (insteadOf, proxies,
credentials), without prompts.
"""

import contextlib
import hashlib
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core import process
from workspace.core.errors import CheckoutError, SourceError, ToolchainError, WorkspaceError
from workspace.core.log import RunLog
from workspace.core.settings import Settings

if TYPE_CHECKING:
    import git as gitpython

Entries = Mapping[str, str]


def split(listing: str) -> list[str]:
    """The entries of a listing that git ends with zero bytes."""
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


def link_entries(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """The entries of those paths that are symbolic links; git's own hashing would follow them."""
    entries = {}
    for path in paths:
        file = root / path
        if file.is_symlink():
            target = os.readlink(os.fsencode(file))
            entries[path] = (
                "120000 " + hashlib.sha1(b"blob %d\0" % len(target) + target).hexdigest()
            )
    return entries


def file_modes(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """The modes of those paths that are regular files; what is gone, or is a repository of its own,
    is left out.
    """
    files = {path: root / path for path in paths}
    return {
        path: "100755" if file.stat().st_mode & 0o100 else "100644"
        for path, file in files.items()
        if file.is_file() and not file.is_symlink()
    }


def digest(entries: Entries) -> str:
    """The SHA-256 over sorted `mode oid path`."""
    text = "".join(f"{entries[path]} {path}\n" for path in sorted(entries))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def first_line(err: str) -> str:
    """The line of git's talk that says what went wrong."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    said = next(
        (line for line in lines if line.startswith(("fatal:", "error:"))), lines[0] if lines else ""
    )
    return re.sub(r"^(fatal|error): ", "", said)


def refusal_of_disk(err: str) -> str | None:
    """The line of git's talk that names a disk that is full or read-only: no patch's and no
    network's fault, whatever else follows.
    """
    return next(
        (
            line.strip()
            for line in err.splitlines()
            if re.search(
                r"No space left|Out of diskspace|Read-only file system|quota exceeded", line
            )
        ),
        None,
    )


IDENTITY = ("vLLM workspace", "workspace@invalid")
# A repository with missing blobs would fetch them in the middle of a look: git 2.44 has a switch,
# older ones are refused every transport.
OFFLINE = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_TERMINAL_PROMPT": "0"}
LOOKING = OFFLINE | {"GIT_OPTIONAL_LOCKS": "0", "GIT_ATTR_NOSYSTEM": "1"}
# Content is compared as it was written, so without the user's conversions; what they ignore stays
# ignored, and whom they trust trusted.
_LOOKING = (
    *("core.attributesFile=/dev/null", "core.autocrlf=false", "core.eol=lf", "core.safecrlf=false"),
    *("core.sparseCheckout=false", "core.fsmonitor=false"),
    # A file that was replaced by one of its size and time is seen by its inode.
    *("core.trustctime=true", "core.checkStat=default"),
)
LOOKING_FLAGS = ("--literal-pathspecs", *(word for setting in _LOOKING for word in ("-c", setting)))
# A remote that sends less than this for a minute is gone (git-config(1), http.lowSpeedLimit).
PATIENCE = {"GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "60"}
# What content, commits and speed must not depend on, whoever configured it: user, system or the
# checkout itself.
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
    # Or every file that is written would from then on count as unchanged.
    "core.ignoreStat": "false",
    "core.sparseCheckout": "false",
    "commit.gpgSign": "false",
    "tag.gpgSign": "false",
    "i18n.commitEncoding": "UTF-8",
    "rerere.enabled": "false",
    "submodule.recurse": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "advice.detachedHead": "false",
    # By default loose objects and the index are not: after a power cut a reference would name an
    # empty file.
    "core.fsync": "all",
}


def git_environment(*, offline: bool = True) -> dict[str, str]:
    """Return the variables under which git writes the same bytes for everyone.

    Offline, the user's and the system's configuration are left out altogether; otherwise they stay,
    for the sake of remotes, and only `HARDENED` overrides them.
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
        # The user's safe.directory is left out with the rest; Git looks first under that very
        # configuration.
        config["safe.directory"] = "*"
        variables |= OFFLINE | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    variables["GIT_CONFIG_COUNT"] = str(len(config))
    for number, (key, value) in enumerate(config.items()):
        variables |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return variables


WAIT_S = 3.0
QUIET_S = 1.0
POLL_S = 0.1
_NAMED = re.compile(
    r"Unable to create '([^']+\.lock)': File exists|could not lock config file (.+?): File exists"
)
# What git locks at the top of its directory; references and their like are found by what git says.
_AT_TOP = (
    "index.lock",
    "HEAD.lock",
    "ORIG_HEAD.lock",
    "REBASE_HEAD.lock",
    "CHERRY_PICK_HEAD.lock",
    "config.lock",
    "shallow.lock",
    "packed-refs.lock",
)


def remove_named(said: str, folder: Path) -> bool:
    """Remove the lock that a git in `folder` complains of, if it is abandoned. False where there is
    none, or somebody holds it.
    """
    found = _NAMED.search(said)
    if found is None:
        return False
    path = folder / (found[1] or f"{found[2]}.lock")
    return _remove([path], folder)


def remove_at_top(git_dir: Path, folder: Path) -> None:
    """Remove abandoned locks of the git directory `git_dir`, whose files lie in `folder`."""
    _remove([git_dir / name for name in _AT_TOP], folder)


def remove_packs(packs: Path, folder: Path) -> None:
    """Remove from the folder `packs` what fetches that were killed have begun there. Git does it
    too, once it is two weeks old and a gc is due (git-gc(1)).
    """
    _remove(list(packs.glob("tmp_*")), folder)


def _remove(paths: Sequence[Path], folder: Path) -> bool:
    """Remove those that are abandoned, watched side by side. False where one stays."""
    began = time.monotonic()
    quiet_since = dict.fromkeys(paths, began)
    while left := [path for path in paths if path.exists()]:
        now = time.monotonic()
        if now - began >= WAIT_S:
            return False
        for path in left:
            if _is_held(path, folder):
                quiet_since[path] = now
            elif now - quiet_since[path] >= QUIET_S:
                path.unlink(missing_ok=True)
        time.sleep(POLL_S)
    return True


def _is_held(path: Path, folder: Path) -> bool:
    """Whether a process that may be looked at (proc(5)) has the lock open, or is a git in this
    repository.
    """
    place, git_dir = os.path.realpath(folder), os.path.realpath(path.parent)
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if Path(f"/proc/{entry}/comm").read_text().startswith("git"):
                cwd = os.readlink(f"/proc/{entry}/cwd")
                if any(cwd == top or cwd.startswith(f"{top}/") for top in (place, git_dir)):
                    return True
            if any(
                os.readlink(f"/proc/{entry}/fd/{number}") == os.path.join(git_dir, path.name)
                for number in os.listdir(f"/proc/{entry}/fd")
            ):
                return True
    return False


OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str


class Command:
    """Git in one directory. Expected failures are raised as `failure`, with git's own first line.

    Raises ToolchainError where git is missing, was killed or finds no room, and CheckoutError where
    it refuses a directory that belongs to someone else.
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

    def look(self, *words: str, check: bool = True) -> Answer:
        return self._git((*LOOKING_FLAGS, *words), LOOKING, check=check, said=words)

    def write(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        run_log: RunLog | None = None,
    ) -> Answer:
        if not self._trusted:
            self.look("rev-parse", "--git-dir")
            self._trusted = True
        if run_log:
            run_log.command(shlex.join(["git", "-C", str(self.path), *words]))
        return self._git(words, git_environment() | dict(env or {}), check=check, said=words)

    def _git(
        self, words: Sequence[str], env: Mapping[str, str], *, check: bool, said: Sequence[str]
    ) -> Answer:
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
            if status == 0 or not remove_named(err, self.path):
                break
        answer = Answer(status, out.decode(errors="surrogateescape"), err)
        if status != 0:
            self._explain(answer, said, check=check)
        return answer

    def _explain(self, answer: Answer, said: Sequence[str], *, check: bool) -> None:
        if refusal := refusal_of_disk(answer.err):
            raise ToolchainError(
                f"git in {self.path}: {refusal}", hint=f"df -h {self.path}; ls -ld {self.path}"
            )
        if found := re.search(r"dubious ownership in repository at '([^']*)'", answer.err):
            place = shlex.quote(found[1])
            raise CheckoutError(
                f"{found[1]} belongs to another user than you, so git refuses to look into it",
                hint=(
                    f"sudo chown -R $(id -un) {place}    or, to trust it as it is: git config"
                    f" --global --add safe.directory {place}"
                ),
            )
        verb = next(word for word in said if not word.startswith("-") and "=" not in word)
        what = f"git {verb} in {self.path}"
        if answer.status < 0:
            # It may have ended anywhere, which is neither of git's answers.
            raise ToolchainError(
                f"{what} {process.describe_status(answer.status)}",
                hint=(
                    "free -h    and the same command again: it goes on, or takes back what was"
                    " begun"
                ),
            )
        if not check:
            return
        if found := re.search(r"Unable to create '([^']*\.lock)': File exists", answer.err):
            hint = f"when no other git runs there: rm {shlex.quote(found[1])}"
            raise self._failure(
                f"{what}: another git, or one that was killed, left {found[1]}", hint=hint
            )
        raise self._failure(
            f"{what}: {first_line(answer.err) or f'exited with {answer.status}'}",
            details=tuple(answer.err.splitlines()[1:10]),
        )

    def talk(
        self, words: Sequence[str], settings: Settings, run_log: RunLog, on_line: OnLine
    ) -> None:
        # A submodule's own directory lies with the superproject's.
        there = self.look(
            "rev-parse",
            "--path-format=absolute",
            "--absolute-git-dir",
            "--git-path",
            "objects/pack",
            check=False,
        )
        if there.status == 0:
            git_dir, packs = map(Path, there.out.splitlines())
            remove_at_top(git_dir, self.path)
            remove_packs(packs, self.path)
        places = (
            [f"--git-dir={self._extra['GIT_DIR']}", f"--work-tree={self.path}"]
            if "GIT_DIR" in self._extra
            else ["-C", str(self.path)]
        )
        process.run(
            [executable().GIT_PYTHON_GIT_EXECUTABLE or "git", *places, *words],
            env=settings.child_environment("plain", git_environment(offline=False) | PATIENCE),
            run_log=run_log,
            on_line=on_line,
            failure=SourceError,
            hint=(
                "check the network and run the same command again; VLLM_MIRROR or TRITON_MIRROR"
                " names a copy, and bootstrap --source release needs none"
            ),
        )


def executable() -> "type[gitpython.Git]":
    """GitPython's command interface, imported late: it costs 0.1 s. Raises ToolchainError where
    there is no git.
    """
    try:
        import git as gitpython
    except ImportError as exc:
        raise _missing() from exc
    return gitpython.Git


def _missing() -> ToolchainError:
    return ToolchainError("git is not there, or cannot be started", hint="sudo apt install git")
