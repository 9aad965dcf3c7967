"""Each form of a tiny model is there: without it Hugging Face's answers have other tokens.

SMOKE_PROOF_CLONE as in test_defects.py.
"""

import json
import subprocess
from pathlib import Path

from tests.proof.smoke import test_defects
from workspace.core.paths import Layout

built = test_defects.built
# Architecture, form, and the change of its configuration or the end of the weights' names that
# takes the form away. The bias of down_proj changes no token of these twelve; layers.mlp judges it.
FORMS: tuple[tuple[str, str, dict[str, object] | str], ...] = (
    ("llama", "an epsilon", {"rms_norm_eps": 1e-6}),
    ("llama", "scaled rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    *(("llama", name, f"{name}_proj.bias") for name in ("q", "k", "v", "o", "gate", "up")),
    ("qwen3", "a window", {"layer_types": ["full_attention"] * 2}),
    ("qwen3", "scaled rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3", "tied embeddings", {"tie_word_embeddings": False}),
    ("gpt-oss-float32", "a window", {"layer_types": ["full_attention"] * 2}),
    ("gpt-oss-float32", "sinks", "sinks"),
    ("gpt-oss-float32", "biases of experts", "proj_bias"),
)
# A bias that is taken away becomes zero, a sink that is taken away counts nothing.
ANSWERS = """
import json, sys
from pathlib import Path
folder, probes, changes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, probes)
import reference
import torch, transformers

def answers(change):
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in (change if isinstance(change, dict) else {}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if isinstance(change, str):
        found = [value for name, value in model.named_parameters() if name.endswith(change)]
        assert found, change
        for value in found:
            value.data.fill_(-1e9 if change == "sinks" else 0.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(max(reference.PROMPTS, key=len))["input_ids"]])
    with torch.inference_mode():
        made = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None)
    return made[0, ids.shape[1] :].tolist()

reference.forbid_tf32(is_compiled=False)
print(json.dumps([answers(change) for change in [{}, *changes]]))
"""


def test_each_form_changes_the_tokens_of_the_reference(built: Layout, tmp_path: Path) -> None:
    python, probes = built.environment_python, built.probes
    same = []
    for architecture in dict.fromkeys(name for name, _, _ in FORMS):
        folder = tmp_path / architecture
        argv = [python, probes / "small_model.py", folder, "--architecture", architecture]
        subprocess.run(argv, check=True, capture_output=True)
        mine = [(form, change) for name, form, change in FORMS if name == architecture]
        changes = json.dumps([change for _, change in mine])
        done = subprocess.run(
            [python, "-c", ANSWERS, folder, probes, changes],
            check=True,
            capture_output=True,
            text=True,
        )
        whole, *without = json.loads(done.stdout.splitlines()[-1])
        pairs = zip(mine, without, strict=True)
        same += [f"{architecture}: {form}" for (form, _), found in pairs if found == whole]
    assert same == []
