"""Recipes: those of this repository are valid, and a wrong recipe is an error with its key."""

from pathlib import Path

import pytest
from hypothesis import given

from tests.fuzz.strategies import damaged, fuzz
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout, here
from workspace.server import recipes

ROOT = Path(__file__).resolve().parents[2]
GOOD = """model = "openai/gpt-oss-120b"
summary = "a model"
notes = ["one"]
[memory]
weights_gib = 60.8
overhead_gib = 6
kv_kib_per_token = 36.0
[flags]
max_model_len = 32000
async-scheduling = true
middleware = ["a", "b"]
[environment]
VLLM_SWITCH = "1"
[[figures]]
what = "speed"
value = "57 tok/s"
source = "somebody#1"
[[alternatives]]
vllm = "<0.18"
why = "because"
without = ["async-scheduling"]
flags = { swap-space = 4 }
environment = { VLLM_OLD = "1" }
"""


def load(folder: Path, text: str | bytes, *, version: str | None = None) -> recipes.Recipe:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / "a.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return recipes.load(Layout(folder), "a", version=version)


def test_gpt_oss_120b_is_served_as_in_the_guide_without_its_mistakes() -> None:
    recipe = recipes.load(here(), "gpt-oss-120b", version="0.31.0")
    args = " ".join(recipe.args)
    for part in (
        "--async-scheduling",
        "--port 8000",
        "--max-model-len 32000",
        "--tensor-parallel-size 1",
        "--max-num-seqs 1024",
        "--gpu-memory-utilization 0.7",
    ):
        assert part in args
    assert not any(part in args for part in ("--swap-space", "0.0.0.0", "trust-remote-code"))
    assert "--moe-backend marlin" in args
    assert any("mxfp8" in note for note in recipe.notes)
    assert len(recipe.figures) == 4
    assert recipe.environment == {}


@pytest.mark.parametrize("name", recipes.names(here()))
def test_every_recipe_here_can_be_read_and_has_its_memory(name: str) -> None:
    recipe = recipes.load(here(), name, version="0.31.0")
    assert recipe.memory.weights_gib > 0
    assert recipe.args
    assert not recipe.asks_for_remote_code


def test_alternatives_replace_parts_of_the_recipe_for_their_versions(
    tmp_path: Path,
) -> None:
    new, old = load(tmp_path, GOOD, version="0.31.0"), load(tmp_path, GOOD, version="0.17.1")
    assert new.args == ("--max-model-len", "32000", "--async-scheduling", "--middleware", "a", "b")
    assert old.args == ("--max-model-len", "32000", "--middleware", "a", "b", "--swap-space", "4")
    assert (new.environment, old.environment) == (
        {"VLLM_SWITCH": "1"},
        {"VLLM_SWITCH": "1", "VLLM_OLD": "1"},
    )
    assert old.notes == ("one", "because")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('summary = "a model"', 'sumary = "a model"', "summary is missing"),
        ("notes", "note", "a recipe has no key 'note'"),
        ("overhead_gib", "overhed_gib", "memory.overhead_gib is missing"),
        ("weights_gib = 60.8", 'weights_gib = "60.8"', "memory.weights_gib is not a number"),
        ("weights_gib = 60.8", "weights_gib = nan", "memory.weights_gib is not a number"),
        ("weights_gib = 60.8", "weights_gib = true", "memory.weights_gib is not a number"),
        ("openai/gpt-oss-120b", "../../etc", "model is not the name of a model"),
        (
            'model = "openai/gpt-oss-120b"',
            'model = "huge"\norigin = "built-in"',
            "model is not one of tiny, smollm2",
        ),
        (
            "max_model_len = 32000",
            "--max-model-len = 32000",
            "flags.--max-model-len is not the name of a flag",
        ),
        (
            "max_model_len = 32000",
            'api-key = "x"',
            "flags.api-key is not for a recipe: put VLLM_API_KEY into .env",
        ),
        (
            "max_model_len = 32000",
            "max_model_len = 2020-01-01",
            "flags.max_model_len is not a switch, a number",
        ),
        (
            'VLLM_SWITCH = "1"',
            "VLLM_SWITCH = 1",
            "environment.VLLM_SWITCH is not a text of one line; quote a number",
        ),
        ('VLLM_SWITCH = "1"', 'HF_TOKEN = "hf_x"', "environment.HF_TOKEN is not for a recipe"),
        ('VLLM_SWITCH = "1"', '"not a name" = "1"', "environment.not a name is not the name of"),
        (
            'vllm = "<0.18"',
            'vllm = "old"',
            "alternatives[1].vllm is not a range of versions of vLLM",
        ),
        ('source = "somebody#1"', "", "figures[1].source is missing"),
        ("[[figures]]", "[figures]", "figures is not a list of tables"),
        ("[memory]", "[memory", "is not TOML"),
    ],
)
def test_wrong_recipe_is_an_error_with_its_file_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert caught.value.message.startswith("recipes/a.toml")
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "name", ["gpt-oss-12b", "../a", "", "a/b", "A", "x" * 5000, "\udcff", "a\nb"]
)
def test_name_without_a_recipe_is_an_error(tmp_path: Path, name: str) -> None:
    load(tmp_path, GOOD)
    with pytest.raises(SettingsError) as caught:
        recipes.load(Layout(tmp_path), name)
    assert len(caught.value.message) < 300
    assert caught.value.hint


@fuzz(fast=60, deep=4000)
@given(damaged(GOOD))
def test_any_content_is_a_recipe_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-recipe"
    folder.mkdir(exist_ok=True)
    try:
        recipe = load(folder, content, version="0.31.0")
    except SettingsError as exc:
        assert exc.hint
        assert "\n" not in exc.message or "is not TOML" in exc.message
    else:
        assert all(
            isinstance(text, str) and "\0" not in text
            for text in (*recipe.args, *recipe.environment.values())
        )
