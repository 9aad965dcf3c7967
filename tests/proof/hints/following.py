"""A printed hint, found in what a verb prints and typed as a user would type it.

A situation is a function with `@runs(names of hints)`. It makes a small world wrong, and follows
each of its hints there. tests/hints/table.py has all situations, and the hints without one.
"""

import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.small.materials import git
from tests.small.world import HOSTILE_GIT, TIMEOUT_S, Ended, World
from workspace.core import hints

REMARK = re.compile(r"    |\s+# ")
SESSION = re.compile(r"\./scripts/nox -s (\S+)(?: --)?")
# The user has a name and a key, whatever the hostile configuration demands.
IDENTITY = {
    f"GIT_{role}_{kind}": value
    for role in ("AUTHOR", "COMMITTER")
    for kind, value in (("NAME", "Ada"), ("EMAIL", "ada@example.org"))
} | {
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "commit.gpgSign",
    "GIT_CONFIG_VALUE_0": "false",
    "GIT_CONFIG_KEY_1": "core.hooksPath",
    "GIT_CONFIG_VALUE_1": "/dev/null",
}
SUBJECT = "[Misc] A subject of the user\n\nUpstream-Status: Pending\n"


@dataclass
class User:
    """A user in the folder of a clone, who types verbs and the commands of hints."""

    world: World
    followed: set[str] = field(default_factory=set)
    # What stands before each command line, and runs it in other surroundings.
    through: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return self.world.root

    @property
    def vllm(self) -> Path:
        return self.world.layout.vllm

    def enter_home(self) -> None:
        """Begin with the home of the small world, whatever another situation left in it."""
        home = self.world.folder / "home"
        shutil.rmtree(home)
        home.mkdir()
        (home / ".gitconfig").write_text(HOSTILE_GIT)

    def inv(self, *args: str, **env: str) -> Ended:
        """Run a verb, or the command line of a session: `./scripts/nox`, `-s`, its name."""
        if args[:1] == ("./scripts/nox",):
            return self.type(shlex.join(args), **env)
        return self.world.run(*args, env=env, through=self.through)

    def type(self, command: str, **env: str) -> Ended:
        """Run a command line in the clone, with `./scripts/inv` of this interpreter."""
        tools = f"{sys.executable} -Es -B"
        typed = command.replace("./scripts/inv", f"{tools} tasks.py")
        typed = SESSION.sub(rf"{tools} -m workspace.cli.sessions \1", typed)
        typed = typed.replace(".workspace/tools/bin/uv", str(self.world.materials.bin / "uv"))
        done = subprocess.run(
            [*self.through, "bash", "-c", typed],
            cwd=self.root,
            env=self.world.env | IDENTITY | {"GIT_EDITOR": self._editor_of_git()} | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Ended(done.returncode, done.stdout, f"> {command}\n{done.stderr}")

    def mounts(self, *lines: str) -> None:
        """Type from now on in a mount namespace, after these commands of a shell in it."""
        script = "\n".join(("set -e", *lines, 'exec "$@"'))
        self.through = ("unshare", "--mount", "sh", "-c", script, "sh")

    def edits_with(self, script: str) -> None:
        """Let the user's editor be a shell script; `$file` is the file, `$line` its line."""
        path = self.world.folder / "editor"
        path.write_text(
            "#!/bin/sh\n"
            'case $1 in +*) line=${1#+}; shift;; esac; file=$1\ntest -f "$file" || exit 1\n'
            f"{script}\n"
        )
        path.chmod(0o755)
        self.world.env["EDITOR"] = str(path)

    def meets(self, name: str, *verb: str, **env: str) -> str:
        """Return the hint of this name that a verb prints, up to its remark."""
        ended = self.inv(*verb, **env)
        assert "Traceback" not in ended.err, ended.output
        found = printed(name, ended)
        assert found, f"{name} is not printed:\n{ended.output}"
        return found

    def follow(
        self,
        name: str,
        *verb: str,
        put: Mapping[str, str] | None = None,
        then: bool = True,
        **env: str,
    ) -> Ended:
        """Meet the hint, type its command, and see that the same verb does without it.

        `put` has the words of the user in the place of words in capitals. `then`: whether the
        command is over the situation, so that the verb passes afterwards.
        """
        command = self.meets(name, *verb, **env)
        for word, value in (put or {}).items():
            assert word in command, command
            command = command.replace(word, value)
        ended = self.type(command, **env)
        assert ended.code == 0, ended.output
        assert "Traceback" not in ended.err, ended.output
        self.followed.add(name)
        if then:
            again = self.inv(*verb, **env)
            assert again.code == 0, again.output
            assert not printed(name, again), again.output
        return ended

    def look(self, name: str, *verb: str, shows: str, **env: str) -> None:
        """Meet a hint that changes nothing: its command runs, and shows what it promises."""
        ended = self.follow(name, *verb, put=None, then=False, **env)
        assert re.search(shows, ended.out + ended.err), ended.output

    def commit(self, subject: str = "[Core] Mine", **files: str) -> str:
        """Commit in vendor/vllm; a name has __ for a slash and a final _py for its suffix."""
        for name, text in files.items():
            (self.vllm / name.replace("__", "/").replace("_py", ".py")).write_text(text)
        self.world.git("add", "--all")
        self.world.git("commit", "--quiet", "-m", f"{subject}\n\nUpstream-Status: Pending")
        return self.world.git("rev-parse", "HEAD")

    def git(self, *args: str) -> str:
        """Run git in the superproject."""
        return git(self.root, *args)

    def _editor_of_git(self) -> str:
        path = self.world.folder / "subject"
        path.write_text(SUBJECT)
        return f"cp {path}"


@dataclass(frozen=True)
class Situation:
    hints: tuple[str, ...]
    run: Callable[[User], None]


def pattern(name: str) -> re.Pattern[str]:
    """Return what a line with this hint looks like."""
    parts = []
    for literal, value, form, _ in string.Formatter().parse(hints.registry()[name].text):
        parts.append(re.escape(literal))
        if value is not None:
            parts.append("(?:.*)" if form == "tail" else "(?:.+?)")
    return re.compile(rf"^\s*(?:hint:|\$) ({''.join(parts)})$", re.MULTILINE)


def printed(name: str, ended: Ended) -> str | None:
    """Return the command of a hint in the output, without its remark."""
    found = pattern(name).search(f"{ended.err}\n{ended.out}")
    return REMARK.split(found[1])[0] if found else None


SITUATIONS: list[Situation] = []


def runs(*names: str) -> Callable[[Callable[[User], None]], Callable[[User], None]]:
    """Enter a function as the situation of these hints."""

    def enter(run: Callable[[User], None]) -> Callable[[User], None]:
        SITUATIONS.append(Situation(names, run))
        return run

    return enter
