"""Compare the layers of a running model with the same computation in float64, for
`parity.py --layers`: each layer on the inputs that it got, with the weights and the configuration
in the model's files, so that a defect in a layer is found there and not only in tokens.

Differences are counted in roundings as in probes/kernels.py. A form of a model, such as a window,
must show: the same computation without it must differ.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Hook = Callable[..., None]

# The kind of a layer by the last part of its name in vLLM.
KINDS = {
    "embed_tokens": "embedding",
    "logits_processor": "embedding",
    **dict.fromkeys(
        ("input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"), "norm"
    ),
    **dict.fromkeys(("qkv_proj", "o_proj"), "linear"),
    "rotary_emb": "rotary",
    "attn": "attention",
    **dict.fromkeys(("mlp", "block_sparse_moe"), "mlp"),
}
# Float32 rounds each term of a sum; attention's exponent and the router's choice amplify. Measured
# with vLLM 0.31.0 on x86-64, and not on aarch64; one per cent is 84,000 roundings.
ROUNDINGS = {
    "embedding": 64.0,
    "norm": 16.0,
    "linear": 64.0,
    "rotary": 64.0,
    "attention": 256.0,
    "mlp": 64.0,
}
# On Arm CPUs an MLP passes on the coarse exp of its activation (SILU_ROUNDINGS in kernels.py).
ARM_CPU_ROUNDINGS = {**ROUNDINGS, "mlp": 1000.0}
# A form shows if a layer without it is this many limits off.
SHOWN = 4.0
DEFAULT_EPSILON = 1e-6
# Where gpt-oss clamps its activation, and the factor in its sigmoid (transformers' model of it).
CLAMP, ALPHA = 7.0, 1.702


@dataclass
class Calls:
    """All calls of one layer: the tensors that came in, and those that went out."""

    inputs: list[list["Tensor"]] = field(default_factory=list)
    outputs: list[list["Tensor"]] = field(default_factory=list)


@dataclass(frozen=True)
class Files:
    """A model as its files describe it; weights are in float64."""

    config: Mapping[str, Any]
    weights: Mapping[str, "Tensor"]

    def product(self, name: str, x: "Tensor") -> "Tensor":
        """Return a linear layer's output."""
        found = x @ self.weights[f"{name}.weight"].t()
        bias = self.weights.get(f"{name}.bias")
        return found if bias is None else found + bias

    @property
    def head(self) -> int:
        return int(self.config["head_dim"])

    def window(self, layer: str) -> int | None:
        """Return the window of a layer, such as model.layers.0.self_attn.attn."""
        window, types = self.config.get("sliding_window"), self.config.get("layer_types")
        is_full = types and types[int(layer.split(".")[2])] == "full_attention"
        return None if window is None or is_full else int(window)


def read(folder: Path, device: "torch.device") -> Files:
    """Read a model in Hugging Face's layout, whose weights are one file."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return Files(config, {name: value.double().to(device) for name, value in weights.items()})


def watched(model: "nn.Module", run: Callable[[], object]) -> dict[str, Calls]:
    """Run something, and return the calls of the model's layers by their names.

    Inputs are copied before a layer runs, because some layers work in place.
    """
    found: dict[str, Calls] = {}
    handles = []
    for own_name, module in model.named_modules():
        name = in_files(own_name)
        # In gpt-oss a module `attn` is all of the attention, with its projections.
        if name.rpartition(".")[2] in KINDS and not hasattr(module, "qkv_proj"):
            before, after = _hooks(found.setdefault(name, Calls()))
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def in_files(name: str) -> str:
    """Return a module's name as transformers writes it, where vLLM's gpt-oss has another one."""
    name = name.replace("model.embedding", "model.embed_tokens")
    return name if ".self_attn" in name else name.replace(".attn", ".self_attn", 1)


def _hooks(calls: Calls) -> tuple["Hook", "Hook"]:
    def before(_: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls.inputs.append(_tensors((*args, *kwargs.values())))

    def after(_: object, __: object, ___: object, output: object) -> None:
        calls.outputs.append(_tensors(output if isinstance(output, tuple) else (output,)))

    return before, after


def _tensors(values: tuple[object, ...]) -> list["Tensor"]:
    import torch

    return [value.detach().clone() for value in values if isinstance(value, torch.Tensor)]


# What a layer must compute: from its name, the model's files and its inputs, to its outputs.
Form = Callable[[str, Files, list["Tensor"]], list["Tensor"]]


def embedding(name: str, files: Files, inputs: list["Tensor"]) -> list["Tensor"]:
    """Return the rows of tokens, or as the model's last layer the scores of all tokens."""
    (given,) = inputs
    rows = files.weights["model.embed_tokens.weight"]
    if name.endswith("embed_tokens"):
        return [rows[given]]
    is_tied = files.config.get("tie_word_embeddings")
    return [given.double() @ (rows if is_tied else files.weights["lm_head.weight"]).t()]


def norm(name: str, files: Files, inputs: list["Tensor"]) -> list["Tensor"]:
    """Return a RMS norm; of a sum, and the sum, if there is a residual."""
    x = inputs[0].double() + (inputs[1].double() if len(inputs) > 1 else 0.0)
    mean = x.pow(2).mean(-1, keepdim=True)
    found = x * (mean + files.config["rms_norm_eps"]).rsqrt() * files.weights[f"{name}.weight"]
    return [found, *([x] if len(inputs) > 1 else [])]


def linear(name: str, files: Files, inputs: list["Tensor"]) -> list["Tensor"]:
    """Return the product with one matrix, or with those of queries, keys and values."""
    import torch

    parts = ("q_proj", "k_proj", "v_proj") if name.endswith("qkv_proj") else ("o_proj",)
    place = name.rpartition(".")[0]
    return [
        torch.cat([files.product(f"{place}.{part}", inputs[0].double()) for part in parts], dim=-1)
    ]


def rotary(name: str, files: Files, inputs: list["Tensor"]) -> list["Tensor"]:
    """Return rotated queries and keys.

    Angles are products in float32, as in vLLM and transformers.
    """
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    positions, *rows = inputs
    form = files.config["rope_parameters"]
    steps = torch.arange(0, files.head, 2) / files.head
    frequencies, factor = 1.0 / form["rope_theta"] ** steps, 1.0
    if form["rope_type"] != "default":
        config = AutoConfig.for_model(**files.config)
        frequencies, factor = ROPE_INIT_FUNCTIONS[form["rope_type"]](config, torch.device("cpu"))
    angles = (positions[:, None].float() * frequencies.to(positions.device)).double()[:, None]
    cosine, sine = angles.cos() * factor, angles.sin() * factor
    turned = []
    for x in rows:
        one, other = x.double().unflatten(-1, (-1, files.head)).chunk(2, dim=-1)
        parts = (one * cosine - other * sine, other * cosine + one * sine)
        turned.append(torch.cat(parts, dim=-1).flatten(-2))
    return turned


def attention(name: str, files: Files, inputs: list["Tensor"]) -> list["Tensor"]:
    """Return causal attention over all tokens of a request, in a window if the layer has one."""
    import torch

    query, key, value = (x.double().unflatten(-1, (-1, files.head)) for x in inputs)
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * files.head**-0.5
    places = torch.arange(len(query), device=query.device)
    back = places[:, None] - places[None, :]
    window = files.window(name) or len(query)
    scores = scores.masked_fill((back < 0) | (back >= window), -math.inf)
    sinks = files.weights.get(f"{name.rpartition('.')[0]}.sinks")
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], dim=-1)
    chances = scores.softmax(-1)[..., : len(query)]
    return [torch.einsum("hqk,khd->qhd", chances, value).flatten(-2)]


def mlp(name: str, files: Files, inputs: list["Tensor"]) -> list["Tensor"]:
    """Return a gated layer, or the weighted sum of the chosen experts."""
    import torch
    from torch.nn import functional

    x = inputs[0].double()
    if f"{name}.gate_proj.weight" in files.weights:
        gate, up = (files.product(f"{name}.{part}", x) for part in ("gate_proj", "up_proj"))
        return [files.product(f"{name}.down_proj", functional.silu(gate) * up)]
    is_gpt_oss = f"{name}.router.weight" in files.weights
    scores = files.product(f"{name}.router" if is_gpt_oss else f"{name}.gate", x)
    best = scores.topk(int(files.config["num_experts_per_tok"]))
    weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1))
    expert = clamped if is_gpt_oss else gated
    rows = [expert(name, files, x, index) for index in range(scores.shape[-1])]
    return [torch.einsum("te,etd->td", weights, torch.stack(rows))]


def gated(name: str, files: Files, x: "Tensor", expert: int) -> "Tensor":
    """Return what one expert of Mixtral makes of all tokens."""
    from torch.nn import functional

    place = f"{name}.experts.{expert}"
    inner = functional.silu(files.product(f"{place}.w1", x)) * files.product(f"{place}.w3", x)
    return files.product(f"{place}.w2", inner)


def clamped(name: str, files: Files, x: "Tensor", expert: int) -> "Tensor":
    """Return what one expert of gpt-oss makes of all tokens."""
    both, down = (
        (files.weights[f"{name}.experts.{part}"], files.weights[f"{name}.experts.{part}_bias"])
        for part in ("gate_up_proj", "down_proj")
    )
    inner = x @ both[0][expert] + both[1][expert]
    gate, up = inner[:, ::2].clamp(max=CLAMP), inner[:, 1::2].clamp(-CLAMP, CLAMP)
    return ((up + 1) * gate * (ALPHA * gate).sigmoid()) @ down[0][expert] + down[1][expert]


LAYERS: dict[str, Form] = {
    form.__name__: form for form in (embedding, norm, linear, rotary, attention, mlp)
}


def forms(files: Files) -> Iterator[tuple[str, str, Files]]:
    """Yield the forms that a model has: the kind of layer, the name of the form, and the model
    without it.
    """

    def without(**changes: object) -> Files:
        return replace(files, config={**files.config, **changes})

    config = files.config
    if config["rms_norm_eps"] != DEFAULT_EPSILON:
        yield "norm", "an epsilon", without(rms_norm_eps=DEFAULT_EPSILON)
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        yield "rotary", f"rope scaled by {rope['rope_type']}", without(rope_parameters=plain)
    if config.get("sliding_window"):
        yield "attention", "a window", without(sliding_window=None)
    for kind, part in (("linear", "self_attn."), ("mlp", "mlp.")):
        left = {
            name: value
            for name, value in files.weights.items()
            if not (part in name and name.endswith(".bias"))
        }
        if len(left) < len(files.weights):
            yield kind, "biases", replace(files, weights=left)
    sinks = {name: value for name, value in files.weights.items() if not name.endswith("sinks")}
    if len(sinks) < len(files.weights):
        yield "attention", "sinks", replace(files, weights=sinks)


def judged(model: "nn.Module", folder: Path, run: Callable[[], object]) -> dict[str, Any]:
    """Return for each kind of layer its rows and the forms that show.

    `run` answers one prompt, alone and with nothing in a cache.
    """
    import torch

    calls = watched(model, run)
    with torch.inference_mode():
        device = next(model.parameters()).device
        files, limits = read(folder, device), roundings(device.type, platform.machine())
        return {kind: _kind(kind, files, calls, limits[kind]) for kind in LAYERS}


def roundings(device: str, machine: str) -> Mapping[str, float]:
    """Return the limit of each kind of layer, by the type of the device and the machine."""
    return ARM_CPU_ROUNDINGS if (device, machine) == ("cpu", "aarch64") else ROUNDINGS


def _kind(kind: str, files: Files, calls: Mapping[str, Calls], limit: float) -> dict[str, Any]:
    started = time.monotonic()
    mine = {
        name: whole(made) if kind == "attention" else made
        for name, made in calls.items()
        if KINDS[name.rpartition(".")[2]] == kind and made.inputs
    }
    rows = [
        {"case": name, "difference": _off(kind, name, files, made), "limit": limit}
        for name, made in mine.items()
    ]
    shown = []
    for of_kind, form, without in forms(files):
        if of_kind != kind:
            continue
        shown.append(form)
        without_it = [_off(kind, name, without, made) for name, made in mine.items()]
        is_shown = any(off is None or off > SHOWN * limit for off in without_it)
        hidden = float(not is_shown)
        rows.append({"case": f"layers that {form} changes", "difference": hidden, "limit": 0.5})
    return {"rows": rows, "forms": shown, "seconds": round(time.monotonic() - started, 3)}


def whole(calls: Calls) -> Calls:
    """Return the calls of one request as one call with all of its tokens."""
    import torch

    joined = [
        [torch.cat(column) for column in zip(*rows, strict=True)]
        for rows in (calls.inputs, calls.outputs)
    ]
    return Calls([joined[0]], [joined[1]])


def _off(kind: str, name: str, files: Files, calls: Calls) -> float | None:
    """Return the largest difference over all calls of a layer, in roundings of float32; None if it
    is not a number.
    """
    import torch

    worst = 0.0
    for inputs, outputs in zip(calls.inputs, calls.outputs, strict=True):
        wanted = LAYERS[kind](name, files, inputs)
        for found, expected in zip(outputs, wanted, strict=True):
            off = (found.double()[..., : expected.shape[-1]] - expected).abs().max()
            worst = max(worst, float(off / expected.abs().max()))
            if not math.isfinite(float(off)):
                return None
    return worst / float(torch.finfo(torch.float32).eps)
