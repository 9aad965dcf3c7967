""".envrc.example in direnv and a real bash."""

import shutil
import subprocess

import pytest

from tests.clone import ROOT, Clone, make_clone

# What an interactive bash does before each prompt, without a terminal.
PROMPT = 'eval "$(direnv hook bash)"; cd "$1"; _direnv_hook; '


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with a checkout and an .envrc that its user has allowed."""
    if shutil.which("direnv", path="/usr/bin:/bin") is None:
        pytest.skip("no direnv on this machine")
    clone = make_clone(tmp_path_factory.mktemp("direnv"))
    shutil.copy(ROOT / ".envrc.example", clone.root / ".envrc")
    (clone.root / ".vllm" / ".workspace").mkdir(parents=True)
    for command in (
        ("init", "-q", clone.root / "vendor" / "vllm"),
        ("-C", clone.root / "vendor" / "vllm", "commit", "-q", "--allow-empty", "-m", "a"),
    ):
        git = clone.run("git", "-c", "user.name=a", "-c", "user.email=a@b", *command)
        assert git.returncode == 0, git.stderr
    assert clone.inv("--version").returncode == 0
    allowed = clone.run("direnv", "allow", clone.root)
    assert allowed.returncode == 0, allowed.stderr
    return clone


def prompt(clone: Clone, commands: str) -> "subprocess.CompletedProcess[str]":
    """Enter the clone and run commands in one bash; `_direnv_hook` is its next prompt."""
    script = PROMPT + commands
    return clone.run("bash", "--norc", "--noprofile", "-c", script, "bash", clone.root)


def test_shell_has_inv_and_the_variables_of_the_clone_in_its_folder_only(clone: Clone) -> None:
    (clone.root / ".env").write_text("VLLM_LOGGING_LEVEL=DEBUG\nHF_TOKEN=hf_secret\n")
    shown = 'echo "$(command -v inv) $VLLM_LOGGING_LEVEL ${HF_TOKEN:-none}"; '
    done = prompt(clone, f"{shown} cd workspace; _direnv_hook; {shown} cd /; _direnv_hook; {shown}")
    inside = f"{clone.root / 'scripts' / 'inv'} DEBUG none"
    assert done.stdout.splitlines() == [inside, inside, "  none"], done.stderr
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "change",
    [
        "echo VLLM_LOGGING_LEVEL=INFO > .env",
        "echo '{}' > .vllm/.workspace/vllm.json",
        "git -C vendor/vllm -c user.name=a -c user.email=a@b commit -q --allow-empty -m b",
    ],
    ids=["settings", "build", "commit"],
)
def test_change_of_what_the_variables_follow_from_makes_them_anew(
    clone: Clone, change: str
) -> None:
    (clone.root / ".env").write_text("VLLM_LOGGING_LEVEL=DEBUG\n")
    # direnv compares times to the second.
    done = prompt(clone, f"_direnv_hook; echo changed >&2; sleep 1; {change}; _direnv_hook")
    before, _, after = done.stderr.partition("changed")
    assert before.count("loading") == 1, done.stderr
    assert after.count("loading") == 1, done.stderr


def test_error_of_inv_is_shown_and_mended_in_the_same_shell(clone: Clone) -> None:
    (clone.root / ".env").write_text("no assignment\n")
    shown = 'echo "$(command -v inv) ${TRITON_CACHE_DIR:+set}"; '
    done = prompt(clone, f"{shown} sleep 1; rm .env; _direnv_hook; {shown}")
    inv = str(clone.root / "scripts" / "inv")
    assert done.stdout.splitlines() == [f"{inv} ", f"{inv} set"], done.stderr
    assert "error: .env, line 1" in done.stderr
