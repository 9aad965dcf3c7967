"""Flags and values as read without torch, compared with the pinned tree's parser and registry."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.machine import run_environment
from workspace.repo import pins
from workspace.server import flags, public_recipes, recipes

# Files in the forms that Spark owners share.
PUBLIC = sorted((Path(__file__).parents[2] / "server" / "public").glob("*.yaml"))
# Prints every option and its count of values; then the parser's result for each command line.
PROGRAM = """
import contextlib, importlib, io, json, sys
for name in ("common", "launchers", "openai"):
    with contextlib.suppress(ImportError):
        module = importlib.import_module(f"vllm.entrypoints.{name}.cli_args")
        break
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = module.make_arg_parser(FlexibleArgumentParser())
options = {option: action.nargs for action in parser._actions for option in action.option_strings}
helps = {
    action.option_strings[0]: action.help or ""
    for action in parser._actions
    if action.option_strings and action.nargs != 0
}
import dataclasses, inspect, vllm.config
fields = sorted({
    field.name
    for _, kind in inspect.getmembers(vllm.config, dataclasses.is_dataclass)
    for field in dataclasses.fields(kind)
})
lines = []
for argv in json.loads(sys.argv[1]):
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            found = vars(parser.parse_args(argv))
            module.validate_parsed_serve_args(parser.parse_args(argv))
        plain = (str, int, float, bool, list)
        values = {key: value for key, value in found.items() if isinstance(value, plain)}
        lines.append({"error": None, "values": values})
    except SystemExit:
        lines.append({"error": err.getvalue().splitlines()[-1]})
print("\\n" + json.dumps(
    {"options": options, "lines": lines, "helps": helps, "fields": fields}
))
"""
# One flag each on which both verdicts must agree.
SPELLINGS = (
    *(
        ["m", "--max_model_len", "7"],
        ["m", "--max_model_len=7"],
        ["m", "--max-model", "7"],
        ["m", "--no-async-scheduling"],
        ["m", "--no_enforce_eager"],
    ),
    *(
        ["m", "-tp", "2"],
        ["m", "-tp2"],
        ["m", "-O3"],
        ["m", "--swap-space", "16"],
        ["m", "--max-modle-len", "7"],
        ["m", "--no-port"],
        ["m", "--m", "1"],
    ),
    *(
        ["m", "--quantization-config.moe.activation", "mxfp8"],
        ["m", "--quantization_config.moe.activation=mxfp8"],
        ["m", "--gpu-memory-utilisation=0.7"],
    ),
    *(
        ["m", "--no-quantization-config"],
        ["m", "--enable-reasoning"],
        ["m", "--no-headless"],
        ["m", "-zz"],
    ),
)


# Flags and settings whose name or help speaks of a file, and whose value is none; why.
NO_FILES = {
    # Refused by inv serve, or its own.
    *("--config", "--uds", "--model", "--api-key", "--hf-token"),
    # The path of a URL; a module or a class; a name of a plugin, of a format or of a method.
    *("--root-path", "--disable-access-log-for-endpoints", "--middleware", "--scheduler-cls"),
    *("--model-class-overrides", "--io-processor-plugin", "--load-format", "--tokenizer-mode"),
    *("--moe-backend", "--quantization", "--safetensors-load-strategy", "--ssl-cert-reqs"),
    *("--chat-template-content-format", "--renderer-num-workers", "--lora-target-modules"),
    *("--safetensors-prefetch-num-threads", "--safetensors-prefetch-block-size"),
    *("--mm-encoder-attn-dtype", "--mm-ipc-gpu-memory-gb", "--default-chat-template-kwargs"),
    *("kv_connector_module_path", "ec_connector_module_path", "io_processor_plugin"),
    # A folder that vLLM sets itself.
    "local_cache_dir",
}
ABOUT_FILES = re.compile(
    r"\b(path|paths|file|files|folder|directory|directories|template|plugin)\b"
)


@pytest.fixture(scope="module")
def recipe_lines(layout: Layout) -> dict[str, list[str]]:
    version = pins.load(layout.pins).vllm.version
    return {
        name: ["m", *recipes.load(layout, name, version=version).args]
        for name in recipes.names(layout)
    } | {path.name: ["m", *public_recipes.load(layout, path).args] for path in PUBLIC}


@pytest.fixture(scope="module")
def parser(
    layout: Layout, recipe_lines: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    lines = json.dumps([*SPELLINGS, *recipe_lines.values()])
    environment = load(layout).child_environment("run", {"HF_HUB_OFFLINE": "1"})
    done = subprocess.run(
        [layout.environment_python, "-c", PROGRAM, lines],
        env=environment,
        cwd=tmp_path_factory.mktemp("neutral"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def test_every_flag_of_the_tree_that_names_a_file_means_the_users_folder(
    parser: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    about = [
        *(
            name
            for name, text in parser["helps"].items()
            if ABOUT_FILES.search(f"{name.replace('-', ' ')} {text}".lower())
        ),
        *(name for name in parser["fields"] if re.search("_(path|dir|file|plugin)$", name)),
    ]
    assert len(about) > 20
    values = {"--default-mm-loras": '{"audio": "own"}', "--lora-modules": "a=own"}
    stay = [
        name
        for name in about
        if name not in NO_FILES
        and str(tmp_path)
        not in " ".join(
            flags.typed_paths([name, values.get(name, "own")])
            if name.startswith("-")
            else flags.typed_paths(["--any", json.dumps({name: "own"})])
        )
    ]
    assert stay == []


def test_the_same_flags_as_the_parser_has(layout: Layout, parser: dict[str, Any]) -> None:
    known = flags.known(layout)
    options = parser["options"]
    assert known.names | known.negated == {option for option in options if option.startswith("--")}
    assert known.shorts - {"-O"} == {option for option in options if not option.startswith("--")}
    assert known.switches | known.negated == {
        option for option, count in options.items() if count == 0 and option.startswith("--")
    } - {"--help"}


@pytest.mark.parametrize(
    "index", range(len(SPELLINGS)), ids=lambda index: " ".join(SPELLINGS[index])
)
def test_the_same_verdict_on_every_spelling(
    layout: Layout, parser: dict[str, Any], index: int
) -> None:
    args, verdict = SPELLINGS[index], parser["lines"][index]
    try:
        judged = flags.judge(args, flags.known(layout))
        is_accepted = not judged.dropped
    except Exception:
        is_accepted = False
    assert is_accepted == (verdict["error"] is None), verdict


def test_command_line_of_every_recipe_is_accepted_whole(
    layout: Layout, parser: dict[str, Any], recipe_lines: dict[str, list[str]]
) -> None:
    assert PUBLIC
    for (name, args), verdict in zip(
        recipe_lines.items(), parser["lines"][len(SPELLINGS) :], strict=True
    ):
        assert verdict["error"] is None, (name, verdict)
        assert flags.judge(args, flags.known(layout)) == flags.Judged(tuple(args))


def test_parser_reads_gpt_oss_120b_as_the_recipe_means_it(
    parser: dict[str, Any], recipe_lines: dict[str, list[str]]
) -> None:
    values = parser["lines"][len(SPELLINGS) + list(recipe_lines).index("gpt-oss-120b")]["values"]
    wanted = {
        "async_scheduling": True,
        "port": 8000,
        "max_model_len": 32000,
        "tensor_parallel_size": 1,
        "max_num_seqs": 1024,
        "moe_backend": "marlin",
    }
    assert {name: values[name] for name in wanted} == wanted
    assert values["gpu_memory_utilization"] == 0.7
    assert values["trust_remote_code"] is False


def test_the_same_variables_as_the_registry_has(layout: Layout) -> None:
    program = "import vllm.envs, json; print(json.dumps(sorted(vllm.envs.environment_variables)))"
    environment = load(layout).child_environment("run")
    done = subprocess.run(
        [layout.environment_python, "-c", program],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert set(json.loads(done.stdout.splitlines()[-1])) == run_environment.known_variables(layout)


def test_no_removed_name_exists(layout: Layout) -> None:
    version = [int(part) for part in pins.load(layout.pins).vllm.version.split(".")]
    known = flags.known(layout)
    for kind, names in (
        ("variables", run_environment.known_variables(layout)),
        ("flags", known.names | known.negated),
    ):
        for former in run_environment.removed_names(kind).values():
            is_gone = not former.gone or [int(part) for part in former.gone.split(".")] <= version
            assert (former.name in names) == (not is_gone), former
            for token in former.instead.replace(",", " ").replace(";", " ").split():
                assert not token.startswith("--") or known.spelled(token), former
                name = token.split("=")[0]
                is_variable = run_environment.VARIABLE.match(token)
                assert not is_variable or name in run_environment.known_variables(layout), former
