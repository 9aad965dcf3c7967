"""Completion of inv: what may follow a line, and Tab in real shells at a terminal."""

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clone import Clone, make_clone
from tests.small.processes import CommandLine, Warm
from workspace.cli.completion import SCRIPTS

# The options that start a shell without the user's own files.
PLAIN = {"bash": ("--norc", "--noprofile"), "fish": ("--no-config",), "zsh": ("-f",)}
LONGEST_S = 40.0


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with recipes, patches and records, but without a checkout; `inv` is on PATH."""
    clone = make_clone(tmp_path_factory.mktemp("ready"))
    for path, text in (
        ("recipes/smollm2.toml", ""),
        ("recipes/tiny.toml", ""),
        ("recipes/coder.yaml", ""),
        ("recipes/$(touch x).toml", ""),
        ("patches/vllm/series", "# base: v0.31.0\nfaster.patch  # remark\n"),
        ("results/gb10/0123456789ab-before.json", "{"),
        ("results/gb10/0123456789ab-after.json", "{"),
        (".workspace/good/v0.31.0-0123456789ab/good.json", "{"),
        (
            "vendor/vllm/setup.py",
            'ext_modules = []\next_modules.append(CMakeExtension(name="vllm._C"))\n',
        ),
    ):
        (clone.root / path).parent.mkdir(parents=True, exist_ok=True)
        (clone.root / path).write_text(text)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", clone.root / "vendor" / "vllm")
    for command in (
        ("init", "-q"),
        ("commit", "-q", "--allow-empty", "-m", "a"),
        ("tag", "v0.30.0"),
    ):
        subprocess.run([*git, *command], check=True)
    (clone.programs / "inv").symlink_to(clone.root / "scripts" / "inv")
    assert clone.inv("--version").returncode == 0
    return clone


@pytest.fixture(scope="module")
def warm(clone: Clone) -> Iterator[Warm]:
    made = Warm(clone.root, clone.programs)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "pat",
            "patch patch.apply patch.continue patch.export patch.import patch.status patch.unapply",
        ),
        ("he", "help"),
        ("help pin.b", "pin.bump"),
        ("--help pin.b", "pin.bump"),
        ("--verb", "--verbose"),
        ("--list-format ", "flat full json nested"),
        ("serve ", "coder smollm2 tiny"),
        ("serve.fetch t", "tiny"),
        ("serve tiny --de", "--detach"),
        ("serve --detach t", "tiny"),
        (
            "serve tiny ",
            "--detach --dry-run --force --help --memory --name --nodes --port --restart",
        ),
        ("serve.stop ", ""),
        ("serve.stop --a", "--all"),
        ("serve tiny -- --po", ""),
        ("completion ", "bash fish zsh"),
        ("patch.export --patch ", "faster.patch"),
        ("patch --project v", "vllm"),
        ("bootstrap --device ", "auto cpu cuda"),
        ("bootstrap --device=c", "--device=cpu --device=cuda"),
        # As bash divides it.
        ("bootstrap --device = c", "cpu cuda"),
        ("bootstrap --device =", "auto cpu cuda"),
        ("bootstrap --device cpu --wa", "--wait"),
        ("rebuild --target ", "_C"),
        ("rebuild --jobs ", ""),
        ("bench.compare before a", "after"),
        ("bench.compare before after --acr", "--across"),
        ("bench.report --first 0123", "0123456789ab-after 0123456789ab-before"),
        ("pin.bump ", "triton v0.30.0"),
        ("pin.rollback --good v", "v0.31.0-0123456789ab"),
        ("fix-triton --ref ", ""),
        ("nonsense ", None),
    ],
)
def test_values_of_this_clone_follow_a_line(warm: Warm, line: str, found: str | None) -> None:
    code, out, err = complete(warm, "--", "inv", *line.split(" "))
    assert (code, err) == (0, "")
    if found is not None:
        assert out.split() == found.split()


def complete(warm: Warm, *args: str) -> tuple[int, str, str]:
    clone = Clone(warm.root, warm.folder)
    line = CommandLine(clone.root, ("--complete", *args), clone.environment(), clone.programs)
    return warm.run(line, timeout_s=LONGEST_S)


def test_line_that_no_shell_sends_is_no_traceback(warm: Warm) -> None:
    for rest in ([], ["--"], ["--", "inv"], ["--", "inv", "patch", "'"], ["--", ""]):
        assert complete(warm, *rest)[2] == ""


def test_flag_of_invoke_prints_the_same_script(clone: Clone) -> None:
    for shell, text in SCRIPTS.items():
        assert clone.inv("completion", shell).stdout == text.lstrip()
        assert clone.inv("--print-completion-script", shell).stdout == text.lstrip()


class Terminal:
    """An interactive shell at a terminal of its own."""

    def __init__(self, shell: str, clone: Clone, home: Path) -> None:
        self.screen = ""
        self._end, end = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", shell, *PLAIN[shell], "-i"],
            stdin=end,
            stdout=end,
            stderr=end,
            cwd=clone.root.parent,
            env=clone.environment(TERM="xterm", HOME=str(home)),
        )
        os.close(end)

    def type(self, keys: str, *, until: str) -> None:
        """Type keys, and wait until a text is on the screen."""
        os.write(self._end, keys.encode())
        ends, begin = time.monotonic() + LONGEST_S, len(self.screen)
        while until not in self.screen[begin:]:
            left = ends - time.monotonic()
            assert select.select([self._end], [], [], max(0.0, left))[0], self.screen
            self.screen += os.read(self._end, 4096).decode(errors="replace")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._end)


@pytest.fixture(params=sorted(PLAIN))
def terminal(request: pytest.FixtureRequest, clone: Clone, tmp_path: Path) -> Iterator[Terminal]:
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    terminal = Terminal(shell, clone, tmp_path)
    take = (
        "inv completion fish | source" if shell == "fish" else f'eval "$(inv completion {shell})"'
    )
    # The quotes keep the echo of the line from being the answer.
    terminal.type(f"{take}; echo rea''dy\n", until="ready")
    yield terminal
    terminal.close()


def test_tab_completes_values_verbs_and_files_in_a_shell(terminal: Terminal, clone: Clone) -> None:
    terminal.type("inv serve smo\t", until="smollm2")
    terminal.type("\x15inv patch.expo\t", until="patch.export")
    terminal.type("\x15inv bootstrap --device=cu\t", until="--device=cuda")
    terminal.type("\x15a\\ clone/scripts/inv serve ti\t", until="tiny")
    terminal.type("\x15inv patch.import a\\ clone/tas\t", until="tasks.py")
