"""Public recipes: each form of the field is read as its author means it, and nothing else is.

tests/proof/serve/test_parser.py judges the same files by the flags of the built tree.
"""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given

from tests.fuzz.strategies import damaged, fuzz
from tests.server.test_flags import CLI, ENGINE
from workspace.core.console import Console
from workspace.core.errors import SettingsError, WorkspaceError
from workspace.core.paths import Layout
from workspace.core.settings import load as load_settings
from workspace.machine.machine import Machine
from workspace.server import command, flags, public_recipes, verbs
from workspace.server.recipes import Recipe

FILES = Path(__file__).with_name("public")
# Flags of the files that the small tree of test_flags lacks.
FURTHER = (
    "--enable-auto-tool-choice --enable-prefix-caching --kv-cache-dtype --optimization-level"
    " --tool-call-parser --revision --speculative-config --runner --limit-mm-per-prompt"
    " --served-model-name --tokenizer"
)
FULL = "model: a/b\ncommand: vllm serve {model} --port 1\n"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A clone with our recipes and a small tree."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "workspace/probes"):
        shutil.copytree(FILES.parents[2] / name, root / name)
    (root / "vendor").mkdir()
    shutil.copy(FILES.parents[2] / "vendor" / "pins.toml", root / "vendor")
    package = root / "vendor" / "vllm" / "vllm"
    (package / "engine").mkdir(parents=True)
    further = "".join(f'        group.add_argument("{name}")\n' for name in FURTHER.split())
    further += '        group.add_argument("--pipeline-parallel-size", "-pp")\n'
    (package / "engine" / "arg_utils.py").write_text(
        ENGINE + further.replace('caching")', 'caching", action=BooleanOptionalAction)')
    )
    (package / "entrypoints" / "openai").mkdir(parents=True)
    (package / "entrypoints" / "openai" / "cli_args.py").write_text(CLI)
    return Layout(root)


def load(layout: Layout, text: str | bytes) -> Recipe:
    path = layout.root / "given.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return public_recipes.load(layout, path)


def test_files_beside_our_recipes_are_listed_and_served_by_name(layout: Layout) -> None:
    folder = layout.root / "recipes"
    for name, text in (
        ("coder.yaml", FULL),
        ("damaged.yml", "model: ["),
        # A recipe of ours goes first.
        ("tiny.yaml", FULL),
    ):
        (folder / name).write_text(text)
    assert public_recipes.named(layout, "coder").model == "a/b"
    assert public_recipes.named(layout, "tiny").model == "tiny"
    out = io.StringIO()
    machine = Machine(layout, load_settings(layout, environ={"DEVICE": "cpu"}))
    verbs.show_recipes(machine, console=Console(out=out, err=out), as_json=True)
    rows = {row["name"]: row for row in json.loads(out.getvalue())["rows"]}
    assert (rows["coder"]["model"], rows["coder"]["on_disk"]) == ("a/b", None)
    assert "damaged.yml" in rows["damaged"]["error"]
    assert rows["tiny"]["model"] == "tiny"
    for name in ("coder.yaml", "damaged.yml", "tiny.yaml"):
        (folder / name).unlink()


def line(layout: Layout, recipe: Recipe) -> str:
    known = flags.known(layout)
    return " ".join(command.compose(recipe, (), known, has_key=False, force=False).args)


@pytest.mark.parametrize(
    ("name", "model", "args"),
    [
        (
            "one-machine",
            "acme/coder-7b-int4",
            (
                "--enable-auto-tool-choice --tool-call-parser hermes --gpu-memory-utilization 0.7"
                " --port 8000 --enable-prefix-caching --max-model-len 32768 --max-num-seqs 16"
                " --kv-cache-dtype fp8 --optimization-level 3"
            ),
        ),
        (
            "two-machines",
            "acme/thinker-400b",
            (
                f"--revision {'0123456789' * 4} --trust-remote-code"
                ' --speculative-config {"method": "ngram", "num_speculative_tokens": 2}'
                ' --compilation-config {"cudagraph_mode": "FULL_AND_PIECEWISE",'
                ' "custom_ops": ["all"]}'
                " --port 8000 --tensor-parallel-size 2 --pipeline-parallel-size 1"
            ),
        ),
        (
            "first-form",
            "acme/mixture-30b",
            (
                "--max-model-len 65536 --port 8000 --tensor-parallel-size 1"
                ' --compilation-config {"cudagraph_mode": "PIECEWISE", "pass_config": {}}'
                " --no-enable-prefix-caching --gpu-memory-utilization 0.8"
            ),
        ),
        (
            "pooling",
            "acme/ranker-8b",
            (
                "--runner pooling --port 8001 --max-model-len -1 --optimization-level 2"
                " --limit-mm-per-prompt.image 2"
            ),
        ),
        ("by-module", "acme/small-1b", "--served-model-name small other"),
        ("tiny", "tiny", "--port 8007 --max-num-seqs 4 --served-model-name shared"),
    ],
)
def test_each_form_of_the_field_is_read_as_it_is_meant(
    layout: Layout, name: str, model: str, args: str
) -> None:
    recipe = public_recipes.load(layout, FILES / f"{name}.yaml")
    assert recipe.model == model
    wanted = args if "--port" in args else f"{args} --port 8000"
    assert line(layout, recipe).replace(" --host 127.0.0.1", "") == wanted


def test_what_belongs_to_a_container_has_no_effect_and_is_named(layout: Layout) -> None:
    recipe = public_recipes.load(layout, FILES / "two-machines.yaml")
    assert recipe.notes == (
        (
            "not used here, where no container is started: container, min_nodes, max_nodes,"
            " build_args, executor_config"
        ),
        "the recipe is made for 2 machines",
        "defaults that the command does not use: data_parallel",
        "--host 0.0.0.0 is left out: a container needs it; -- --host opens the server",
        "not set, because they are of the container: LD_PRELOAD",
    )
    assert recipe.environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert recipe.summary == "A thinker on two machines"
    first = public_recipes.load(layout, FILES / "first-form.yaml")
    assert first.environment == {"VLLM_MARLIN_USE_ATOMIC_ADD": "1", "ACME_SWITCH": "0"}
    # A flag of a former release is left out with the reason, as in a recipe of ours.
    assert any(note.startswith("--swap-space 4 is left out") for note in first.notes)


def test_users_flag_goes_before_a_short_flag_of_the_file(layout: Layout) -> None:
    recipe = public_recipes.load(layout, FILES / "two-machines.yaml")
    made = command.compose(
        recipe, ("-tp", "4", "--port=9"), flags.known(layout), has_key=False, force=False
    )
    assert flags.last(made.args, "--port") == "9"
    assert "--port 8000" not in " ".join(made.args)


def test_relative_paths_count_from_the_folder_of_the_file(layout: Layout) -> None:
    (layout.root / "own").mkdir()
    recipe = load(layout, "model: a/b\ncommand: vllm serve ./own --tokenizer ./words\n")
    assert recipe.model == str(layout.root / "own")
    assert recipe.flags == {"tokenizer": str(layout.root / "words")}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it has no keys"),
        ("- a\n- b\n", "it has no keys"),
        ("vllm serve a/b", "it has no keys"),
        ("model: [\n", "is not YAML, line"),
        (b"model: \xff\xfe\n", "is not YAML"),
        ("a: " + "[" * 50_000, "more than 20 levels"),
        ("- " * 30_000, "more than 20 levels"),
        ("a: 2026-99-99\n", "is not YAML"),
        ("a: !!python/object/apply:os.system [id]\n", "is not YAML"),
        ("x" * 70_000, "more than 64 KiB"),
        (
            "model: a/b\ncontainer: c\nmods: [m]\n",
            "it has no command, and so no flags of",
        ),
        ("model: a/b\ncommand: [vllm, serve]\n", "command is not a text"),
        ("model: a/b\ndefaults: 3\ncommand: vllm serve {x}\n", "defaults is not a table"),
        ("model: a/b\nruntime: sglang\ndefaults: {port: 1}\n", "it is a recipe of sglang"),
        ("runtime: llama-cpp\ncommand: llama-server -m a.gguf\n", "it is a recipe of llama-cpp"),
        ("command: llama-server -m a.gguf\n", "its command starts llama-server -m, and only"),
        ("command: python3 -m sglang.launch_server --model a/b\n", "its command starts python3 -m"),
        ("command: docker run x vllm serve a/b\n", "its command starts docker run, and only"),
        (f"{FULL.strip()} && touch never\n", "its command needs a shell (&&)"),
        (f"{FULL.strip()}; touch never\n", "its command needs a shell (;)"),
        (f"{FULL.strip()} | tee log\n", "its command needs a shell (|)"),
        (f"{FULL.strip()} > log\n", "its command needs a shell (>)"),
        (f"{FULL.strip()} --revision $(touch never)\n", "its command needs a shell ("),
        (f"{FULL.strip()} --revision `touch never`\n", "its command needs a shell (`)"),
        (f'{FULL.strip()} --revision "${{HOME}}"\n', "its command needs a shell ("),
        ("command: |\n  pip install x\n  vllm serve a/b\n", "several commands, a line each"),
        ("command: vllm serve a/b --revision 'x\n", "cannot be read: No closing quotation"),
        ("command: vllm serve {model}\n", "command needs a value for {model}"),
        ("command: vllm serve --port 1\n", "model is missing"),
        ("command: vllm serve other.yaml\n", "model is missing, or is not"),
        ("command: vllm serve word\n", "'word' is not the name of a model on the hub"),
        ("command: vllm serve /models/a\n", "its model is the folder /models/a, which is not on"),
        ("command: vllm serve a/b c/d\n", "an argument without a flag, 'c/d'"),
        (f"{FULL.strip()} --max-modle-len 5\n", "the pinned vLLM has no flag --max-modle-len"),
        (f"{FULL.strip()} -zz 5\n", "the pinned vLLM has no flag -zz"),
        (f"{FULL.strip()} --hf-token x\n", "cannot be given to inv serve: put HF_TOKEN into .env"),
        (f"{FULL}env: {{HF_TOKEN: hf_secret}}\n", "env.HF_TOKEN is not for a recipe"),
        (f"{FULL}env: {{A: true}}\n", "env.A is not a text of one line"),
        (f"{FULL}env: {{A: '{{launch.path}}'}}\n", "env.A needs a value for {launch.path}"),
        (f"{FULL}env: [A=1]\n", "env is not a table"),
        (
            'model: a/b\ndefaults: {x: "1; touch never"}\ncommand: vllm serve {model} --port {x}\n',
            "its command needs a shell (;)",
        ),
    ],
)
def test_file_that_is_no_such_recipe_is_refused_with_its_reason(
    layout: Layout, text: str | bytes, problem: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(layout, text)
    assert problem in caught.value.message
    assert str(layout.root / "given.yaml") in caught.value.message
    assert caught.value.hint
    assert "hf_secret" not in caught.value.message
    assert not (layout.root / "never").exists()
    assert not Path("never").exists()


def test_aliases_that_multiply_are_refused_before_they_are_resolved(layout: Layout) -> None:
    rows = ["a0: &a0 {x: 1}"]
    rows += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    with pytest.raises(SettingsError, match="more than 20 aliases"):
        load(layout, "\n".join(rows))
    one = "x: &port 7\nmodel: a/b\ndefaults: {port: *port}\ncommand: vllm serve --port {port}\n"
    assert load(layout, one).flags == {"port": "7"}


def test_operator_between_quotes_is_text(layout: Layout) -> None:
    text = "command: vllm serve a/b --served-model-name 'a && $HOME' \"b|c\" --port 1 \\\n"
    recipe = load(layout, f"model: a/b\n{text}")
    assert recipe.flags["served-model-name"] == ("a && $HOME", "b|c")


def test_value_may_have_several_lines_and_a_comment_is_no_command(layout: Layout) -> None:
    text = """model: a/b
model_revision: abc
command: |
  # How it is started:
  vllm serve {model} \\
    --speculative-config '{
      "method": "ngram"
    }' \\
    --port 1
"""
    flags_of_it = load(layout, text).flags
    assert flags_of_it["speculative-config"] == '{\n    "method": "ngram"\n  }'
    assert (flags_of_it["port"], flags_of_it["revision"]) == ("1", "abc")


def test_missing_or_unreadable_file_is_a_sentence(layout: Layout) -> None:
    for name in ("none.yaml", "none/none.yaml", "recipes"):
        with pytest.raises(SettingsError, match="cannot be read") as caught:
            public_recipes.load(layout, layout.root / name)
        assert "none" not in str(caught.value.hint)


@fuzz(fast=60, deep=4000)
@given(damaged((FILES / "one-machine.yaml").read_text()))
def test_damaged_file_is_a_recipe_or_a_sentence(layout: Layout, content: bytes) -> None:
    try:
        recipe = load(layout, content)
    except WorkspaceError as exc:
        assert re.search("yaml|vendor/vllm", exc.message)
    else:
        assert recipe.model
