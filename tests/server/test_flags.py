"""Flags of a small tree with every form in which vLLM defines them; tests/proof/serve compares with
the real parser.
"""

from pathlib import Path

import pytest

from workspace.core.errors import SettingsError, ToolchainError
from workspace.core.paths import Layout
from workspace.machine import run_environment
from workspace.server import flags

CLI = """
class BaseFrontendArgs:
    lora_modules: list[str] | None = None
    enable_log_outputs: bool = False
class FrontendArgs(BaseFrontendArgs):
    host: str | None = None
    port: int = 8000
    _own: int = 0
def make(parser):
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--api-server-count", "-asc", type=int)
"""
ENGINE = """
class EngineArgs:
    max_model_len: int = 1
    max_num_seqs: int | None = None
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    trust_remote_code: bool = False
    gpu_memory_utilization: float = 0.9
    hf_token: bool | str | None = None
    quantization_config: dict | None = None
    compilation_config: object = None
    not_a_flag: bool = False
    def add(parser, kwargs):
        group.add_argument("--max-model-len", **kwargs["max_model_len"])
        group.add_argument("--max-num-seqs", **kwargs["max_num_seqs"])
        group.add_argument("--enforce-eager", **kwargs["enforce_eager"])
        group.add_argument("--async-scheduling", **kwargs["async_scheduling"])
        group.add_argument("--trust-remote-code", **kwargs["trust_remote_code"])
        group.add_argument("--gpu-memory-utilization", **kwargs["gpu"])
        group.add_argument("--quantization", "-q", **kwargs["quantization"])
        group.add_argument("--moe-backend", **kwargs["moe"])
        group.add_argument("--hf-token", **kwargs["hf_token"])
        group.add_argument("--quantization-config", **kwargs["q"])
        group.add_argument("--compilation-config", "-cc", **kwargs["cc"])
        group.add_argument("--tensor-parallel-size", "-tp", type=int)
        group.add_argument("--log-stats", action=argparse.BooleanOptionalAction)
"""
GUIDE = (
    *(
        "--async-scheduling",
        "--port",
        "8000",
        "--host",
        "0.0.0.0",
        "--trust-remote-code",
        "--swap-space",
        "16",
        "--max-model-len",
        "32000",
    ),
    *("--tensor-parallel-size", "1", "--max-num-seqs", "1024", "--gpu-memory-utilization", "0.7"),
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("tree"))
    for path, text in {
        "engine/arg_utils.py": ENGINE,
        "entrypoints/launchers/cli_args.py": CLI,
    }.items():
        (layout.vllm / "vllm" / path).parent.mkdir(parents=True)
        (layout.vllm / "vllm" / path).write_text(text)
    return layout


@pytest.fixture(scope="module")
def known(tree: Layout) -> flags.Flags:
    return flags.known(tree)


def test_names_switches_and_short_forms_are_read_from_every_form_of_definition(
    known: flags.Flags,
) -> None:
    assert {
        "--port",
        "--lora-modules",
        "--headless",
        "--max-model-len",
        "--log-stats",
        "--config",
    } <= known.names
    assert not {"--own", "--not-a-flag", "--model-tag"} & known.names
    assert known.negatable == {
        "--enforce-eager",
        "--async-scheduling",
        "--trust-remote-code",
        "--enable-log-outputs",
        "--log-stats",
    }
    assert known.switches == known.negatable | {"--headless"}
    assert {"-tp", "-cc", "-asc", "-O"} <= known.shorts


def test_old_guides_command_line_loses_swap_space_with_its_value_and_a_sentence(
    known: flags.Flags,
) -> None:
    judged = flags.judge(GUIDE, known)
    assert judged.args == tuple(arg for arg in GUIDE if arg not in ("--swap-space", "16"))
    assert judged.dropped == (
        (
            "--swap-space 16 is left out: it is gone since vLLM 0.18.1 (vllm-project/vllm#36216);"
            " nothing replaces it, remove it"
        ),
    )


@pytest.mark.parametrize(
    ("args", "accepted"),
    [
        (["--max_model_len", "5"], ["--max-model-len", "5"]),
        (["--max_model_len=5"], ["--max-model-len=5"]),
        (
            ["--no-async-scheduling", "--no_enforce_eager"],
            ["--no-async-scheduling", "--no-enforce-eager"],
        ),
        (
            ["--quantization_config.moe.activation_x", "mxfp8"],
            ["--quantization-config.moe.activation_x", "mxfp8"],
        ),
        (["--quantization-config.moe=a.b_c"], ["--quantization-config.moe=a.b_c"]),
        (["--max-model", "7"], ["--max-model-len", "7"]),
        (
            ["-tp", "2", "-tp=2", "-q8", "-O3", "-cc.mode=3"],
            ["-tp", "2", "-tp=2", "-q8", "-O3", "-cc.mode=3"],
        ),
        (["some/model", "-1", "-.5", "-", "--"], ["some/model", "-1", "-.5", "-", "--"]),
        (["--swap_space=4", "x"], ["x"]),
        (["--num-scheduler-steps", "8", "--use-v2-block-manager", "--port", "1"], ["--port", "1"]),
    ],
)
def test_spellings_that_vllms_parser_accepts_are_accepted(
    known: flags.Flags, args: list[str], accepted: list[str]
) -> None:
    assert list(flags.judge(args, known).args) == accepted


@pytest.mark.parametrize(
    ("token", "alike"),
    [
        ("--max-modle-len", "--max-model-len"),
        ("--gpu-memory-utilisation=0.7", "--gpu-memory-utilization"),
        ("--no-headless", "--headless"),
        ("--no-port", "--port"),
        ("--m", ""),
        ("--max-", ""),
        ("-tpx", "-tp"),
        # vLLM's parser refuses it, too.
        ("-tp2", "-tp"),
        ("-z", ""),
        ("--", None),
        ("---", ""),
        ("--\udcff", ""),
        ("--quantization-confi.moe", "--quantization-config"),
    ],
)
def test_unknown_flag_stops_with_the_nearest_names(
    known: flags.Flags, token: str, alike: str | None
) -> None:
    if alike is None:
        assert flags.judge([token], known).args == (token,)
        return
    with pytest.raises(SettingsError) as caught:
        flags.judge([token], known)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert alike in caught.value.hint


def test_last_value_counts(known: flags.Flags) -> None:
    args = ["--port", "1", "x", "--port=2", "--max-model-len", "3"]
    assert (
        flags.last(args, "--port"),
        flags.last(args, "--max-model-len"),
        flags.last(args, "--host"),
    ) == ("2", "3", None)
    assert flags.last([], "--port") is None
    assert flags.last(["--enforce-eager"], "--enforce-eager") == ""


@pytest.mark.parametrize(
    ("name", "value", "args"),
    [
        ("max-model-len", 32000, ["--max-model-len", "32000"]),
        ("async-scheduling", True, ["--async-scheduling"]),
        ("enforce_eager", False, ["--no-enforce-eager"]),
        ("middleware", ["a", "b c"], ["--middleware", "a", "b c"]),
        ("compilation-config", {"mode": 3}, ["--compilation-config", '{"mode": 3}']),
        (
            "quantization-config.moe.activation_x",
            "mxfp8",
            ["--quantization-config.moe.activation_x", "mxfp8"],
        ),
    ],
)
def test_values_of_a_recipe_become_arguments(name: str, value: object, args: list[str]) -> None:
    assert flags.args_of(name, value) == args


def test_flag_that_replaces_a_removed_flag_is_not_removed_itself() -> None:
    for former in (
        *run_environment.removed_names("flags").values(),
        *run_environment.removed_names("variables").values(),
    ):
        assert (
            not {token.strip(",;") for token in former.instead.split()}
            & run_environment.removed_names("flags").keys()
        )


def test_tree_without_a_command_line_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="no command line"):
        flags.known(Layout(tmp_path))
    package = Layout(tmp_path).vllm / "vllm"
    (package / "engine" / "arg_utils.py").mkdir(parents=True)
    with pytest.raises(ToolchainError):
        flags.known(Layout(tmp_path))
