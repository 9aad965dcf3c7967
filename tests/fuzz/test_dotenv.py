"""Settings from any .env, shell and flag: usable, or one sentence that names place and fault."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import places
from tests.fuzz.strategies import HUGE, args, arguments, damaged, fuzz
from workspace.core import settings
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_swordfish42"
SHELL = {"PATH": "/usr/bin:/bin", "HOME": "/home/someone", "HF_TOKEN": SECRET}
_FOLDER = tempfile.TemporaryDirectory()
# Every setting once, with its default or something in its place.
ORIGINAL = (
    "".join(
        f"{line.lstrip('#')}\n"
        for line in (ROOT / ".env.example").read_text().splitlines()
        if "=" in line
    )
    + f"HF_TOKEN={SECRET}\nMAX_JOBS=4\nCUDA_HOME=~/cuda\n"
    + "TORCH_INDEX_URL=https://me:hunter2@index.example/simple\nVLLM_LOGGING_LEVEL=DEBUG\n"
)


def load(
    content: bytes, shell: Mapping[str, str] = SHELL, flags: Mapping[str, str] | None = None
) -> settings.Settings | None:
    """Settings, or None after proof that the refusal is one sentence with a way on and without the
    secret. The folder is always the same one: relative paths in .env count from it.
    """
    (Path(_FOLDER.name) / ".env").write_bytes(content)
    try:
        return settings.load(Layout(Path(_FOLDER.name)), environ=shell, flags=flags)
    except SettingsError as exc:
        assert exc.hint
        for text in (exc.message, exc.hint):
            assert SECRET not in text
            assert "hunter2" not in text
            assert "\n" not in text
            assert len(text) < 600
        return None


def are_usable(found: settings.Settings) -> None:
    """What every reader of settings takes for granted."""
    for setting in settings.SETTINGS:
        found.switch(setting.name)
        if setting.kind == "count":
            count = found.count(setting.name)
            assert count is None or 1 <= count <= 1_000_000
        if setting.kind == "path":
            path = found.path(setting.name)
            assert path is None or "\0" not in str(path)
        if setting.kind == "choice":
            assert found.text(setting.name) in setting.choices
        assert not {"\n", "\0"} & set(found.text(setting.name))
    assert found.cache.name == "vllm-workspace" or found.text("WORKSPACE_CACHE_DIR")
    for phase in ("plain", "build", "run"):
        for name, text in found.child_environment(phase).items():
            assert b"\0" not in os.fsencode(name) + os.fsencode(text)
        assert phase == "run" or "HF_TOKEN" not in found.child_environment(phase)
    assert not any(
        SECRET in repr(warning) or "hunter2" in repr(warning) for warning in found.warnings
    )


@fuzz(fast=80, deep=6000)
@given(damaged(ORIGINAL))
@example(f"CONNECT_TIMEOUT_S={HUGE}\n".encode())
@example(b"CONNECT_TIMEOUT_S=9999999\n")
@example(b"CUDA_HOME=~nobody-of-this-name/cuda\n")
@example(f"HF_TOKEN={SECRET}\nDEVICE=${{HF_TOKEN}}\n".encode())
@example(b"TORCH_INDEX_URL=ftp://me:hunter2@index.example/simple\n")
@example(b"DEVICE=" + b"x" * 4000 + b"\n")
def test_any_dotenv_gives_usable_settings_or_a_sentence(content: bytes) -> None:
    found = load(content)
    assert (found is None) == (load(content) is None)
    if found is not None:
        are_usable(found)
        again = load(content)
        assert again is not None
        assert (again.values, again.passed, again.warnings) == (
            found.values,
            found.passed,
            found.warnings,
        )


@fuzz(fast=80, deep=6000)
@given(
    st.dictionaries(
        st.sampled_from(
            sorted({*settings.KNOWN, "HOME", "XDG_CACHE_HOME", "VIRTUAL_ENV", "PIP_INDEX_URL"})
        ),
        arguments,
        max_size=3,
    )
)
@example({"MAX_JOBS": HUGE})
@example({"TRITON_PTXAS_PATH": "~nobody-of-this-name/ptxas"})
@example({"WORKSPACE_CACHE_DIR": "~nobody-of-this-name"})
@example({"TORCH_INDEX_URL": "https://you:hunter2@index.example"})
@example({"KERNELS": "~nobody-of-this-name/a.whl", "VLLM_MIRROR": "~nobody-of-this-name"})
def test_any_shell_gives_usable_settings_or_a_sentence(shell: dict[str, str]) -> None:
    for content in (b"", ORIGINAL.encode()):
        found = load(content, SHELL | shell)
        if found is not None:
            are_usable(found)
            for name, text in shell.items():
                if name in settings.KNOWN:
                    # A relative path counts from the folder in which the command was typed.
                    assert found.text(name) in (text, str(Path.cwd() / os.path.expanduser(text)))


@fuzz(fast=40, deep=3000)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("DEVICE", "SOURCE", "KERNELS", "MAX_JOBS"), arguments)
    )
)
@example({"DEVICE": SECRET})
def test_any_flag_gives_usable_settings_or_a_sentence_that_names_it(flags: dict[str, str]) -> None:
    found = load(f"HF_TOKEN={SECRET}\n".encode(), SHELL, flags)
    if found is not None:
        are_usable(found)
        assert all(
            found.text(name) == text and found.source(name) == "flag"
            for name, text in flags.items()
        )


@fuzz(fast=40, deep=3000)
@given(st.dictionaries(st.sampled_from(sorted(settings.KNOWN)), args, max_size=6))
def test_accepted_values_written_back_are_the_same(given_values: dict[str, str]) -> None:
    bare = {name: text for name, text in SHELL.items() if name not in settings.KNOWN}
    found = load(
        b"", bare | {name: text for name, text in given_values.items() if "\0" not in text}
    )
    if found is None or any(
        "${" in value.text or "\r" in value.text for value in found.values.values()
    ):
        return
    quoted = {
        name: value.text.replace("\\", "\\\\").replace("'", "\\'")
        for name, value in found.values.items()
    }
    written = load("".join(f"{name}='{text}'\n" for name, text in quoted.items()).encode(), bare)
    assert written is not None
    assert {name: value.text for name, value in written.values.items()} == {
        name: value.text for name, value in found.values.items()
    }


@pytest.mark.parametrize("thing", places.NO_FILE)
def test_whatever_lies_in_the_place_of_dotenv_never_hangs(tmp_path: Path, thing: str) -> None:
    places.put(tmp_path / ".env", thing)
    with places.ends_soon():
        if thing in ("nothing", "dangling link"):
            assert settings.load(Layout(tmp_path), environ=SHELL).text("DEVICE") == "auto"
        else:
            with pytest.raises(SettingsError) as caught:
                settings.load(Layout(tmp_path), environ=SHELL)
            assert caught.value.hint
