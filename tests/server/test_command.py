"""The command line of a server: its flags, the flags it refuses, its defaults; and the next step
after a lack of memory.
"""

from dataclasses import replace

import pytest

from workspace.core.errors import SettingsError
from workspace.machine.failures import Lack
from workspace.server import command, fit
from workspace.server.fit import Free
from workspace.server.flags import Flags
from workspace.server.recipes import Memory, Recipe

NAMES = (
    "api-key async-scheduling config gpu-memory-utilization headless help hf-token host"
    " max-model-len max-num-seqs port served-model-name ssl-certfile tensor-parallel-size"
    " trust-remote-code uds"
)
SWITCHES = frozenset({"--async-scheduling", "--trust-remote-code", "--headless"})
KNOWN = Flags(
    frozenset(f"--{name}" for name in NAMES.split()),
    SWITCHES,
    frozenset({"--async-scheduling"}),
    frozenset({"-tp", "-h"}),
)
RECIPE = Recipe(
    name="big",
    model="some/big",
    origin="hub",
    summary="",
    memory=Memory(60, 6, 36),
    flags={
        "port": 8000,
        "async-scheduling": True,
        "max-model-len": 32000,
        "max-num-seqs": 1024,
        "gpu-memory-utilization": 0.7,
    },
)


def compose(
    *extra: str, has_key: bool = False, force: bool = False, recipe: Recipe = RECIPE
) -> command.Command:
    return command.compose(recipe, extra, KNOWN, has_key=has_key, force=force)


def test_users_flag_replaces_the_recipes_and_no_flag_appears_twice() -> None:
    args = compose("--port=8001", "--no-async-scheduling", "--max_num_seqs", "8").args
    recipes = ("--max-model-len", "32000", "--gpu-memory-utilization", "0.7")
    assert args == (
        *recipes,
        "--port=8001",
        "--no-async-scheduling",
        "--max-num-seqs",
        "8",
        "--host",
        "127.0.0.1",
    )


def test_server_listens_to_this_machine_only_and_trusts_no_remote_code_by_default() -> None:
    line = compose()
    assert (line.address.host, line.address.port, line.notes) == ("127.0.0.1", 8000, ())
    assert "--trust-remote-code" not in line.args
    asking = compose(recipe=replace(RECIPE, flags={**RECIPE.flags, "trust-remote-code": True}))
    assert "the recipe asks for it" in asking.notes[0]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "spark.local"])
def test_server_open_to_others_needs_a_key_or_force(host: str) -> None:
    with pytest.raises(SettingsError, match="without a key") as caught:
        compose("--host", host)
    assert "VLLM_API_KEY" in (caught.value.hint or "")
    assert "--force" in (caught.value.hint or "")
    assert "without a key" in compose("--host", host, force=True).notes[0]
    assert "need VLLM_API_KEY" in compose("--host", host, has_key=True).notes[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_server_for_this_machine_needs_no_key(host: str) -> None:
    assert compose("--host", host).notes == ()


def test_former_flag_is_left_out_and_unknown_flag_stops_with_the_nearest_name() -> None:
    line = compose("--swap-space", "16")
    assert "16" not in line.args
    assert "--swap-space 16 is left out: it is gone since vLLM" in line.dropped[0]
    with pytest.raises(SettingsError, match="no flag --max-modle-len") as caught:
        compose("--max-modle-len", "7")
    assert "--max-model-len" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "extra",
    [
        *(
            ("--port", "99999"),
            ("--port", "0"),
            ("--port", "-1"),
            ("--port",),
            ("--port", "8o"),
            ("--port", "٣"),
            ("--host",),
            ("--host=",),
        ),
        *(
            ("--gpu-memory-utilization", "-0.5"),
            ("--gpu-memory-utilization", "0"),
            ("--gpu-memory-utilization", "70"),
            ("--gpu-memory-utilization", "nan"),
        ),
        *(
            ("--max-num-seqs", "0"),
            ("--max-num-seqs", "many"),
            ("--tensor-parallel-size", "-1"),
            ("--max-model-len", "0"),
            ("--max-model-len", "long"),
        ),
        *(
            ("--api-key", "sk-secret"),
            ("--hf-token", "hf_secret"),
            ("--config", "x.yaml"),
            ("--uds", "/x"),
            ("--headless",),
            ("--help",),
            ("-h",),
        ),
    ],
)
def test_invalid_value_is_refused_before_the_load(extra: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        compose(*extra)
    assert caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    "extra",
    [
        ("--max-model-len", "32k"),
        ("--max-model-len", "auto"),
        ("--gpu-memory-utilization", ".7"),
        ("-tp", "2"),
        ("--max-num-seqs=8",),
    ],
)
def test_value_that_the_parser_accepts_is_accepted(extra: tuple[str, ...]) -> None:
    assert compose(*extra).extra == extra


UNIFIED = Free(119, 80, 30, is_unified=True)
DROPPED = replace(UNIFIED, droppable_gib=0.2)


def next_step(*extra: str, free: Free = DROPPED, lack: Lack = "memory") -> str | None:
    return fit.next_step(fit.Attempt("big", RECIPE, compose(*extra)), free, lack=lack)


def test_steps_follow_each_other_and_each_is_a_command() -> None:
    assert next_step(free=UNIFIED) == "./scripts/inv drop-caches && ./scripts/inv serve big"
    commands: list[str] = []
    extra: tuple[str, ...] = ()
    for _ in range(4):
        commands.append(next_step(*extra) or "")
        extra = tuple(commands[-1].partition(" -- ")[2].split())
    assert commands == [
        "./scripts/inv serve big -- --gpu-memory-utilization 0.6",
        "./scripts/inv serve big -- --gpu-memory-utilization 0.6 --max-num-seqs 512",
        (
            "./scripts/inv serve big -- --gpu-memory-utilization 0.6 --max-num-seqs 512"
            " --max-model-len 16000"
        ),
        (
            "./scripts/inv serve big -- --max-num-seqs 512 --max-model-len 16000"
            " --gpu-memory-utilization 0.5"
        ),
    ]


def test_too_small_cache_never_gets_a_smaller_share() -> None:
    assert (
        next_step(free=UNIFIED, lack="cache") == "./scripts/inv serve big -- --max-model-len 16000"
    )


def test_steps_end() -> None:
    extra = ("--gpu-memory-utilization", "0.1", "--max-num-seqs", "1", "--max-model-len", "300")
    assert next_step(*extra) is None


def test_step_keeps_the_users_other_flags() -> None:
    assert (
        next_step("--port", "9000", "--gpu-memory-utilization=0.7")
        == "./scripts/inv serve big -- --port 9000 --gpu-memory-utilization 0.6"
    )
