"""Flags of a small tree with every form in which vLLM defines them; tests/proof/serve compares with
the real parser.
"""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
PATHS = (
    # Flags of vLLM 0.31 that name a file or a folder.
    (("--ssl-certfile", "cert.pem"), ("--ssl-certfile", "{at}/cert.pem")),
    (("--ssl_keyfile=key.pem",), ("--ssl_keyfile={at}/key.pem",)),
    (("--ssl-ca-certs", "../ca.pem"), ("--ssl-ca-certs", "{at}/../ca.pem")),
    (("--allowed-local-media-path", "."), ("--allowed-local-media-path", "{at}")),
    (("--download-dir", "weights"), ("--download-dir", "{at}/weights")),
    (("--chat-template", "mine.jinja"), ("--chat-template", "{at}/mine.jinja")),
    (("--tool-parser-plugin", "plugin.py"), ("--tool-parser-plugin", "{at}/plugin.py")),
    (("--reasoning-parser-plugin=plugin.py",), ("--reasoning-parser-plugin={at}/plugin.py",)),
    (("--tokenizer", "./tok"), ("--tokenizer", "{at}/tok")),
    (("--hf-config-path", "lora"), ("--hf-config-path", "{at}/lora")),
    (("--generation-config", "./g"), ("--generation-config", "{at}/g")),
    (
        ("--lora-modules", "a=./lora", '{"name": "b", "path": "lora"}', "--port", "80"),
        ("--lora-modules", "a={at}/lora", '{"name": "b", "path": "{at}/lora"}', "--port", "80"),
    ),
    (("--lora-modules=a=lora",), ("--lora-modules=a={at}/lora",)),
    (("--default-mm-loras", '{"audio": "lora"}'), ("--default-mm-loras", '{"audio": "{at}/lora"}')),
    (
        ("--speculative-config", '{"model": "./draft", "method": "eagle3"}'),
        ("--speculative-config", '{"model": "{at}/draft", "method": "eagle3"}'),
    ),
    (("--speculative-config.model", "./draft"), ("--speculative-config.model", "{at}/draft")),
    (("-sc.model=./draft",), ("-sc.model={at}/draft",)),
    (
        ("--kv-transfer-config", '{"kv_connector_extra_config": {"shared_storage_path": "kv"}}'),
        (
            "--kv-transfer-config",
            '{"kv_connector_extra_config": {"shared_storage_path": "{at}/kv"}}',
        ),
    ),
    (("-cc.cache_dir=c",), ("-cc.cache_dir={at}/c",)),
    (("--compilation-config", '{"debug_dump_path": "d"}'), None),
    (
        ("--profiler-config.torch_profiler_dir", "p"),
        ("--profiler-config.torch_profiler_dir", "{at}/p"),
    ),
    (("--logging-config.pylogging_config_file", "l.json"), None),
    (
        ("--dataset-path", "data.json", "--seed", "-1"),
        ("--dataset-path", "{at}/data.json", "--seed", "-1"),
    ),
)
NO_PATHS = (
    ("--chat-template", "{% for m in messages %}./x{% endfor %}"),
    ("--chat-template", "tool_chat_template.jinja"),
    ("--tokenizer", "acme/other"),
    ("--generation-config", "auto"),
    ("--tool-parser-plugin", "my.module"),
    ("--lora-modules", "a=acme/adapter"),
    ("--root-path", "../api"),
    ("--served-model-name", "./tiny"),
    ("--profiler-config.torch_profiler_dir", "gs://bucket/p"),
    ("--speculative-config", '{"model":"acme/draft"}'),
    ("--hf-overrides", '{"architectures": ["A"]}'),
    ("--middleware", "my.module.run"),
    ("--ssl-certfile", "/etc/cert.pem"),
    ("--max-model-len", "-1", "--seed", "lora"),
)


@pytest.mark.parametrize(("typed", "made"), PATHS)
def test_path_means_the_folder_in_which_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: tuple[str, ...], made: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    for name in ("mine.jinja", "plugin.py"):
        (tmp_path / name).touch()
    found = flags.typed_paths(typed)
    assert str(tmp_path) in found[-1] + found[1 % len(found)]
    if made:
        assert found == tuple(part.replace("{at}", str(tmp_path)) for part in made)
    # Another folder may be meant, such as that of a recipe.
    assert flags.typed_paths(typed, Path("/other")) != found


@pytest.mark.parametrize("args", NO_PATHS)
def test_value_that_names_no_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    assert flags.typed_paths(args) == args


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


VALUES = st.text(max_size=12) | st.sampled_from(
    ("./a", "../a", "~/a", ".", "a=./b", '{"model": "./a"}', '["./a"]', "[", "-1", "--", "a/b", "=")
)
FLAGS = st.sampled_from(
    ("--lora-modules", "--tokenizer", "--ssl-certfile", "-tp", "--speculative-config.model", "--x")
)


@given(st.lists(FLAGS | VALUES | st.tuples(FLAGS, VALUES).map("=".join)))
@example(["--ssl-certfile=", "-0"])
@example(["--tokenizer", "-1"])
def test_typed_paths_keep_every_argument_and_are_the_same_when_typed_again(
    args: list[str],
) -> None:
    once = flags.typed_paths(args, Path("/folder"))
    assert flags.typed_paths(once, Path("/other")) == once
    assert [arg.split("=")[0] for arg in once if arg.startswith("-")] == [
        arg.split("=")[0] for arg in args if arg.startswith("-")
    ]
    assert len(once) == len(args)
