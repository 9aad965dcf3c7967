"""`inv run`, `inv shell` and `inv env.export`: the started programs, and the exported lines as a
real sh reads them.
"""

import io
import os
import pty
import re
import select
import shlex
import shutil
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workspace.core.console import Console
from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.known_settings import is_secret
from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.machine.machine import Machine
from workspace.server import command, verbs

ROOT = Path(__file__).resolve().parents[2]
# Hypothesis draws words of our own source, too: a secret has no line.
names = (
    st.text(string.ascii_letters + "_", min_size=1, max_size=6)
    .map(lambda name: f"MY_{name}")
    .filter(lambda name: not is_secret(name))
)
values = st.text(
    st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30
) | st.sampled_from(
    (
        "$(touch /tmp/never)",
        "`id`",
        "a'b",
        '"',
        "\\",
        "\n\n",
        "-n",
        "; exit 3",
        "${HOME}",
        "~",
        "*",
        "#",
        "é\u2028",
        "trailing \n",
        "!x",
        "a b",
    )
)


def evaluated(lines: list[str], outer: dict[str, str], program: str = "sh") -> dict[str, str]:
    """Return the environment of a child of a shell that evaluated the lines by `eval "$(…)"`."""
    script = 'eval "$(cat)"; exec env -0'
    done = subprocess.run(
        [program, "-euc", script],
        input="\n".join(lines).encode() + b"\n",
        env=outer,
        capture_output=True,
        timeout=20,
        check=True,
    )
    pairs = (entry.decode().partition("=") for entry in done.stdout.split(b"\0") if entry)
    return {name: text for name, _, text in pairs}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(names, values, max_size=4), st.dictionaries(names, values, max_size=2))
@example({"MY_A": "'; touch /tmp/never; '"}, {})
@example({"MY_A": "'\"'\"'"}, {"MY_A": "b"})
def test_sh_understands_every_value_as_it_is(wanted: dict[str, str], outer: dict[str, str]) -> None:
    outer = {"PATH": "/usr/bin:/bin", **outer}
    lines = list(command.lines(Layout(Path("/a clone's")), {**outer, **wanted}, outer))
    seen = evaluated(lines, outer)
    assert {name: seen[name] for name in wanted} == wanted
    assert seen["PATH"] == "/a clone's/scripts:/usr/bin:/bin"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_read_only_variable_of_bash_does_not_stop_it() -> None:
    lines = list(
        command.lines(
            Layout(Path("/c")), {"UID": "7", "_": "z", "MY_A": "b", "not a name": "x", "é": "y"}, {}
        )
    )
    assert evaluated(lines, {"PATH": "/usr/bin:/bin"}, "bash")["MY_A"] == "b"
    assert [line.partition("=")[0] for line in lines] == ["export MY_A", "export PATH"]


def test_lists_of_folders_get_ours_in_front_once_and_no_line_appears_twice() -> None:
    layout = Layout(Path("/c"))
    environment = {
        "PATH": "/c/.vllm/bin:/cuda/bin:/usr/bin",
        "LD_LIBRARY_PATH": "/cuda/lib64",
        "HOME": "/h",
        "HF_TOKEN": "hf_secret",
    }
    outer = {"PATH": "/usr/bin", "HOME": "/h"}
    lines = list(command.lines(layout, environment, outer))
    seen = evaluated(lines, outer)
    assert (seen["PATH"], seen["LD_LIBRARY_PATH"]) == (
        "/c/scripts:/cuda/bin:/usr/bin",
        "/cuda/lib64",
    )
    assert "hf_secret" not in "".join(lines)
    assert list(command.lines(layout, environment, seen)) == []


def built(root: Path) -> Layout:
    layout = Layout(root)
    layout.environment_python.parent.mkdir(parents=True)
    layout.environment_python.symlink_to(sys.executable)
    layout.probes.parent.mkdir()
    layout.probes.symlink_to(ROOT / "workspace" / "probes")
    return layout


def become(
    layout: Layout,
    *argv: str,
    verb: str = "run",
    own_shell: str = "",
    home: Path = Path("/nowhere"),
    **how: object,
) -> "subprocess.Popen[str]":
    """Start `inv run -- ARGV`, or `inv shell`, in a process of its own."""
    call = (
        "verbs.run_command(machine, sys.argv[2:], console=main.console())"
        if verb == "run"
        else "verbs.open_shell(machine, console=main.console())"
    )
    code = (
        "import sys; from pathlib import Path; from workspace.cli import main; from workspace.core"
        " import settings; from workspace.core.paths import Layout\nfrom workspace.machine.machine"
        " import Machine\nfrom workspace.server import verbs; layout = Layout(Path(sys.argv[1]))\n"
        "def verb():\n    machine = Machine(layout, settings.load(layout))\n    " + call + "\n"
        "sys.exit(main.run(verb))"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "TERM": "xterm",
        "PYTHONPATH": str(ROOT),
        "VLLM_VERSION_OVERRIDE": "1",
        "HF_TOKEN": "hf_secret",
    }
    environment |= {"SHELL": own_shell} if own_shell else {}
    # fish refuses a terminal that is not the controlling one.
    leads = ["setsid", "--ctty"] if "stdin" in how else []
    program = [*leads, sys.executable, "-c", code, str(layout.root), *argv]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(program, env=environment, text=True, **streams | how)  # type: ignore[call-overload]


def test_command_gets_arguments_stdin_folder_and_environment_and_returns_its_exit_code(
    tmp_path: Path,
) -> None:
    layout = built(tmp_path / "clone")
    layout.dotenv.write_text("CMAKE_ARGS=-DX\nMY_OWN='a b'\n")
    script = (
        'cat; printf "%s|" "$@"; pwd; echo'
        ' "$MY_OWN,$CMAKE_ARGS,$VLLM_VERSION_OVERRIDE,$HF_TOKEN,$MAX_JOBS,$VIRTUAL_ENV"; exit 7'
    )
    child = become(layout, "sh", "-c", script, "x", "a b", "'", "--flag", "", cwd=tmp_path)
    out, err = child.communicate("input\n", timeout=20)
    assert child.returncode == 7, err
    first, arguments, last = out.splitlines()
    assert (first, arguments) == ("input", f"a b|'|--flag||{tmp_path}")
    own, *rest, token, jobs, environment = last.split(",")
    assert (own, rest, token, environment) == (
        "a b",
        ["", ""],
        "hf_secret",
        str(layout.environment),
    )
    assert int(jobs) >= 1


def test_command_is_found_in_the_built_environment_first_and_gets_signals(
    tmp_path: Path,
) -> None:
    layout = built(tmp_path)
    program = layout.environment / "bin" / "sleeper"
    program.write_text(
        "#!/bin/sh\ntrap 'echo ended; exit 9' TERM\necho here\nwhile :; do sleep 0.01; done\n"
    )
    program.chmod(0o755)
    child = become(layout, "sleeper")
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGTERM)
    assert (child.communicate(timeout=20)[0], child.returncode) == ("ended\n", 9)


def test_command_has_the_terminal(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    child = become(
        built(tmp_path),
        "sh",
        "-c",
        "test -t 0 && test -t 1 && test -t 2 && exit 5",
        stdin=end,
        stdout=end,
        stderr=end,
    )
    os.close(end)
    assert child.wait(timeout=20) == 5
    os.close(terminal)


def test_shell_is_the_users_own_or_else_sh(tmp_path: Path) -> None:
    layout = built(tmp_path)
    own = layout.environment / "bin" / "own-shell"
    own.write_text('#!/bin/sh\necho "own $VIRTUAL_ENV"\nexit 4\n')
    own.chmod(0o755)
    child = become(layout, verb="shell", own_shell=str(own))
    assert (child.communicate(timeout=20)[0], child.returncode) == (
        f"own {layout.environment}\n",
        4,
    )
    child = become(layout, verb="shell")
    assert (child.communicate("exit 6\n", timeout=20)[0], child.returncode) == ("", 6)


@pytest.mark.parametrize("shell", ["bash", "dash", "fish", "zsh"])
def test_shell_reads_the_users_files_and_shows_where_it_is(tmp_path: Path, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} on this machine")
    home = tmp_path / "home"
    (home / "zsh").mkdir(parents=True)
    (home / ".config" / "fish").mkdir(parents=True)
    (home / ".bashrc").write_text("export MY_OWN=yes PS1='own> '\n")
    (home / ".zshenv").write_text("ZDOTDIR=~/zsh\n")
    (home / "zsh" / ".zshrc").write_text("export MY_OWN=yes PROMPT='own> '\n")
    (home / ".config" / "fish" / "config.fish").write_text(
        "set -x MY_OWN yes\nfunction fish_prompt; echo -n 'own> '; end\n"
    )
    terminal, end = pty.openpty()
    layout = built(tmp_path / "clone")
    child = become(
        layout, verb="shell", own_shell=program, home=home, stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    asked = 'echo "[$MY_OWN]"; echo "[$PATH]"; echo "[$ZDOTDIR]"; exit 3\n'
    screen = ""
    # Until the shell has closed its terminal, which ends the reading with an error.
    while select.select([terminal], [], [], 20)[0]:
        try:
            screen += os.read(terminal, 4096).decode(errors="replace")
        except OSError:
            break
        if asked and "(vllm)" in screen:
            os.write(terminal, asked.encode())
            asked = ""
    os.close(terminal)
    assert child.wait(timeout=20) == 3, screen
    prompt = "(vllm) $ " if shell == "dash" else "(vllm) own> "
    seen = re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|\(B|\][^\x07]*\x07)", "", screen)
    assert prompt in seen
    assert ("[yes]" in seen) == (shell != "dash")
    assert f"{layout.root}/scripts:{layout.environment}/bin" in seen.replace(" ", ":")
    assert (f"[{home}/zsh]" in seen) == (shell == "zsh")


def test_closed_pipe_ends_the_command_as_in_a_shell(tmp_path: Path) -> None:
    layout = built(tmp_path)
    child = become(layout, "yes")
    assert child.stdout is not None
    assert child.stdout.readline() == "y\n"
    child.stdout.close()
    child.stdout = None
    child.communicate(timeout=20)
    assert child.returncode == -signal.SIGPIPE


def test_command_that_cannot_run_is_an_error(tmp_path: Path) -> None:
    console = Console(out=io.StringIO(), err=io.StringIO())
    layout = Layout(tmp_path / "bare")
    found = load(layout, environ={"PATH": "/usr/bin"})
    with pytest.raises(SettingsError, match="no command"):
        verbs.run_command(Machine(layout, found), [], console=console)
    with pytest.raises(ToolchainError, match="no built environment"):
        verbs.run_command(Machine(layout, found), ["true"], console=console)
    made = built(tmp_path / "made")
    machine = Machine(made, load(made, environ={"PATH": "/usr/bin"}))
    with pytest.raises(ToolchainError, match="no-such-program is missing"):
        verbs.run_command(machine, ["no-such-program"], console=console)
    made.dotenv.write_text("VLLM_CPU_KVCACHE_SPACE=900000\nDEVICE=cpu\n")
    with pytest.raises(SettingsError, match="VLLM_CPU_KVCACHE_SPACE=900000"):
        machine = Machine(made, load(made, environ={"PATH": "/usr/bin"}))
        verbs.run_command(machine, ["true"], console=console)


def test_export_leaves_out_secrets_with_a_note(tmp_path: Path) -> None:
    layout = built(tmp_path)
    layout.dotenv.write_text("HF_TOKEN=hf_secret\nMY_OWN='a b'\n")
    out, err = io.StringIO(), io.StringIO()
    verbs.export_variables(
        Machine(layout, load(layout, environ={"PATH": os.environ["PATH"]})),
        console=Console(out=out, err=err),
    )
    assert f"export MY_OWN={shlex.quote('a b')}" in out.getvalue().splitlines()
    assert "hf_secret" not in out.getvalue() + err.getvalue()
    assert "left out, because they are secret: HF_TOKEN" in err.getvalue()


def test_exported_values_are_not_the_users_until_the_user_changes_one(tmp_path: Path) -> None:
    layout = built(tmp_path)
    layout.dotenv.write_text("MY_OWN=a\nHF_TOKEN=hf_secret\n")
    own = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CUDA_CACHE_PATH": "/own"}
    out = io.StringIO()
    before = load(layout, environ=own)
    verbs.export_variables(Machine(layout, before), console=Console(out=out, err=io.StringIO()))
    seen = evaluated(out.getvalue().splitlines(), own)
    assert {"MAX_JOBS", "TRITON_CACHE_DIR", "MY_OWN"} <= seen.keys()
    after = load(layout, environ=seen)
    assert after.source("MAX_JOBS") == "default"
    assert not after.is_users("TRITON_CACHE_DIR")
    assert after.is_users("CUDA_CACHE_PATH")
    assert after.passed["MY_OWN"].source == ".env"
    of_sh = {"PWD", "OLDPWD", "SHLVL", "_"}
    compilers = [one.child_environment("compile", layout=layout).keys() for one in (before, after)]
    assert compilers[0] - of_sh == compilers[1] - of_sh
    changed = load(layout, environ={**seen, "MAX_JOBS": "7", "TRITON_CACHE_DIR": "/mine"})
    assert (changed.text("MAX_JOBS"), changed.source("MAX_JOBS")) == ("7", "shell")
    assert changed.is_users("TRITON_CACHE_DIR")


def test_line_that_was_deleted_from_dotenv_leaves_the_shell_with_the_next_export(
    tmp_path: Path,
) -> None:
    layout = built(tmp_path)
    layout.dotenv.write_text("MY_OWN=a\nMY_OTHER=b\n")
    seen = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CUDA_CACHE_PATH": "/own"}
    for text in ("MY_OWN=a\nMY_OTHER=b\n", "MY_OTHER=b\n", "MY_OTHER=b\n"):
        layout.dotenv.write_text(text)
        out = io.StringIO()
        machine = Machine(layout, load(layout, environ=seen))
        verbs.export_variables(machine, console=Console(out=out, err=io.StringIO()))
        seen = evaluated(out.getvalue().splitlines(), seen)
    assert "MY_OWN" not in seen
    assert (seen["MY_OTHER"], seen["CUDA_CACHE_PATH"]) == ("b", "/own")
    assert not load(layout, environ=seen).is_users("MY_OWN")
    # What the user set there since is the user's.
    kept = load(layout, environ={**seen, "MY_OTHER": "mine"})
    assert kept.passed["MY_OTHER"].source == "shell"
