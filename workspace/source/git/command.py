"""How git is called: GitPython itself, and under which variables git looks, writes and talks.

Looking honours the user's configuration, takes no lock and never goes online. Writing is immune to that configuration.
Only what talks to a remote keeps the user's configuration (insteadOf, proxies, credentials), without prompts.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core import process
from workspace.core.errors import CheckoutError, SourceError, ToolchainError, WorkspaceError
from workspace.core.journal import Journal
from workspace.core.settings import Settings
from workspace.source import hardening, leftover
from workspace.source.content import first_line, refusal_of_disk

if TYPE_CHECKING:
    import git as gitpython

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str


class Command:
    """Git in one directory. Expected failures are raised as `failure`, with git's own first line.

    Raises ToolchainError where git is missing, was killed or finds no room, and CheckoutError where it refuses a directory that belongs to
    someone else.
    """

    def __init__(self, path: Path, *, git_dir: Path | None = None, failure: type[WorkspaceError] = CheckoutError) -> None:
        self.path = path.absolute()
        self._failure = failure
        self._extra = {"GIT_DIR": str(git_dir.absolute()), "GIT_WORK_TREE": str(self.path)} if git_dir else {}
        self._trusted = False

    def look(self, *words: str, check: bool = True) -> Answer:
        return self._git((*hardening.LOOKING_FLAGS, *words), hardening.LOOKING, check=check, said=words)

    def write(self, *words: str, env: Mapping[str, str] | None = None, check: bool = True, journal: Journal | None = None) -> Answer:
        if not self._trusted:
            self.look("rev-parse", "--git-dir")
            self._trusted = True
        if journal:
            journal.command(shlex.join(["git", "-C", str(self.path), *words]))
        return self._git(words, hardening.environment() | dict(env or {}), check=check, said=words)

    def _git(self, words: Sequence[str], env: Mapping[str, str], *, check: bool, said: Sequence[str]) -> Answer:
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
        answer = Answer(status, out.decode(errors="surrogateescape"), err)
        if status != 0:
            self._explain(answer, said, check=check)
        return answer

    def _explain(self, answer: Answer, said: Sequence[str], *, check: bool) -> None:
        if refusal := refusal_of_disk(answer.err):
            raise ToolchainError(f"git in {self.path}: {refusal}", hint=f"df -h {self.path}; ls -ld {self.path}")
        if found := re.search(r"dubious ownership in repository at '([^']*)'", answer.err):
            place = shlex.quote(found[1])
            raise CheckoutError(
                f"{found[1]} belongs to another user than you, so git refuses to look into it",
                hint=f"sudo chown -R $(id -un) {place}    or, to trust it as it is: git config --global --add safe.directory {place}",
            )
        verb = next(word for word in said if not word.startswith("-") and "=" not in word)
        what = f"git {verb} in {self.path}"
        if answer.status < 0:
            # It may have ended anywhere, which is neither of git's answers.
            raise ToolchainError(
                f"{what} {process.describe_status(answer.status)}", hint="free -h    and the same command again: it goes on, or takes back what was begun"
            )
        if not check:
            return
        if found := re.search(r"Unable to create '([^']*\.lock)': File exists", answer.err):
            hint = f"when no other git runs there: rm {shlex.quote(found[1])}"
            raise self._failure(f"{what}: another git, or one that was killed, left {found[1]}", hint=hint)
        raise self._failure(f"{what}: {first_line(answer.err) or f'exited with {answer.status}'}", details=tuple(answer.err.splitlines()[1:10]))

    def talk(self, words: Sequence[str], settings: Settings, journal: Journal, on_line: OnLine) -> None:
        # A submodule's own directory lies with the superproject's.
        there = self.look("rev-parse", "--path-format=absolute", "--absolute-git-dir", "--git-path", "objects/pack", check=False)
        if there.status == 0:
            git_dir, packs = map(Path, there.out.splitlines())
            leftover.remove_at_top(git_dir, self.path)
            leftover.remove_packs(packs, self.path)
        places = [f"--git-dir={self._extra['GIT_DIR']}", f"--work-tree={self.path}"] if "GIT_DIR" in self._extra else ["-C", str(self.path)]
        process.run(
            [executable().GIT_PYTHON_GIT_EXECUTABLE or "git", *places, *words],
            env=settings.child_environment("plain", hardening.environment(offline=False) | hardening.PATIENCE),
            journal=journal,
            on_line=on_line,
            failure=SourceError,
            hint="check the network and run the same command again; VLLM_MIRROR or TRITON_MIRROR names a copy, and bootstrap --source release needs none",
        )


def executable() -> "type[gitpython.Git]":
    """GitPython's command interface, imported late: it costs 0.1 s. Raises ToolchainError where there is no git."""
    try:
        import git as gitpython
    except ImportError as exc:
        raise _missing() from exc
    return gitpython.Git


def _missing() -> ToolchainError:
    return ToolchainError("git is not there, or cannot be started", hint="sudo apt install git")
