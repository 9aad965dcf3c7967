"""probes/layers.py without torch: names, windows, and the forms that a model has."""

from types import ModuleType

PLAIN = {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def test_layer_of_gpt_oss_has_its_name_in_the_files(probe: ModuleType) -> None:
    names = ("model.layers.1.attn.attn", "model.embedding", "model.layers.0.self_attn.attn")
    assert [probe.in_files(name) for name in names] == [
        "model.layers.1.self_attn.attn",
        "model.embed_tokens",
        "model.layers.0.self_attn.attn",
    ]


def test_window_is_that_of_the_layer(probe: ModuleType) -> None:
    types = ["full_attention", "sliding_attention"]
    files = probe.Files({"sliding_window": 48, "layer_types": types}, {})
    found = [files.window(f"model.layers.{index}.self_attn.attn") for index in (0, 1)]
    assert found == [None, 48]
    assert probe.Files({"sliding_window": 48}, {}).window("model.layers.0.self_attn.attn") == 48
    assert probe.Files({}, {}).window("model.layers.0.self_attn.attn") is None


def test_model_without_forms_has_none(probe: ModuleType) -> None:
    weights = dict.fromkeys(("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"))
    assert list(probe.forms(probe.Files(PLAIN, weights))) == []


def test_each_form_is_named_and_taken_away_alone(probe: ModuleType) -> None:
    scaled = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0}
    config = {"rms_norm_eps": 0.01, "rope_parameters": scaled, "sliding_window": 48}
    weights = dict.fromkeys(
        f"model.layers.0.{name}" for name in ("self_attn.q_proj.bias", "mlp.up_proj.bias")
    )
    found = {
        (kind, form): without for kind, form, without in probe.forms(probe.Files(config, weights))
    }
    assert list(found) == [
        ("norm", "an epsilon"),
        ("rotary", "rope scaled by yarn"),
        ("attention", "a window"),
        ("linear", "biases"),
        ("mlp", "biases"),
    ]
    assert found["attention", "a window"].config == config | {"sliding_window": None}
    assert list(found["linear", "biases"].weights) == ["model.layers.0.mlp.up_proj.bias"]
    plain = {"rope_type": "default", "rope_theta": 1e6}
    assert found["rotary", "rope scaled by yarn"].config == config | {"rope_parameters": plain}
