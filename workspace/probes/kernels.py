"""Compare the compiled operators that models use with plain torch. Each group runs in a forked
child, so that a crash is a result.

Differences are counted in roundings: units of the type's precision, relative to the largest value
of a reference in float64. One JSON document on stdout.
"""

import argparse
import itertools
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

document = SimpleNamespace(**run_path(str(Path(__file__).with_name("document.py"))))
SCHEMA = 1
GROUP_TIMEOUT_S = 300.0
DTYPES = ("float32", "bfloat16")
# A correctly rounded result is half a unit off; sums, and exp and tanh as polynomials, cost a few
# more in float32. Measured with vLLM 0.31.0 on x86-64: at most 2.2 in float32 and 0.65 in bfloat16;
# an emulated aarch64 needs less than half of the limits, too. One per cent is 84,000 and 1.3.
# Attention averages: at most 0.38 in bfloat16, on an H200 0.29; 1.03 if its scale is 1 % off.
ROUNDINGS = {"float32": 16.0, "bfloat16": 1.5}
ATTENTION_ROUNDINGS = {"float32": 16.0, "bfloat16": 0.75}
# On Arm CPUs vLLM's exp is torch's coarse fexp_u20 (csrc/cpu/cpu_types_arm.hpp): 151 to 238 there.
SILU_ROUNDINGS = {"cpu aarch64": {"float32": 1000.0, "bfloat16": 1.5}}

# Name, difference and its limit.
Case = tuple[str, float, float]
Group = Callable[[ModuleType, str], Iterator[Case]]
Limits = Mapping[str, float]


class Absent(Exception):
    """An operator that this build lacks; the message is the reason."""


def rounded(
    name: str, found: "Tensor", expected: "Tensor", dtype: str, limits: Limits = ROUNDINGS
) -> Case:
    """Return a case whose difference, in roundings of the type, must be within its limit."""
    import torch

    difference: float = (found.double() - expected).abs().max().item()
    difference /= expected.abs().max().item() * torch.finfo(getattr(torch, dtype)).eps
    return name, difference, limits[dtype]


def drawn(*shape: int, dtype: str, device: str, scale: float = 1.0) -> "Tensor":
    """Return random numbers of a normal distribution."""
    import torch

    return (torch.randn(*shape, device=device) * scale).to(getattr(torch, dtype))


def norm(ops: ModuleType, device: str) -> Iterator[Case]:
    import torch

    def expected(x: "Tensor", weight: "Tensor") -> "Tensor":
        x = x.double()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()

    for dtype in DTYPES:
        for tokens, width in ((7, 256), (33, 2880)):
            shape = f"{tokens}x{width} {dtype}"
            x, residual = (drawn(tokens, width, dtype=dtype, device=device) for _ in range(2))
            weight = drawn(width, dtype=dtype, device=device) + 1
            out = torch.empty_like(x)
            ops.rms_norm(out, x, weight, 1e-6)
            yield rounded(f"rms_norm {shape}", out, expected(x, weight), dtype)
            added = x.double() + residual.double()
            ops.fused_add_rms_norm(x, residual, weight, 1e-6)
            yield rounded(f"fused_add_rms_norm {shape}", x, expected(added, weight), dtype)
            yield rounded(f"fused_add_rms_norm's sum {shape}", residual, added, dtype)


def activation(ops: ModuleType, device: str) -> Iterator[Case]:
    import torch
    from torch.nn import functional

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "silu_and_mul": functional.silu,
        "gelu_and_mul": functional.gelu,
        "gelu_tanh_and_mul": lambda x: functional.gelu(x, approximate="tanh"),
    }
    silu = SILU_ROUNDINGS.get(f"{device} {platform.machine()}", ROUNDINGS)
    for dtype in DTYPES:
        for tokens, width in ((7, 512), (33, 2880)):
            x = drawn(tokens, 2 * width, dtype=dtype, device=device)
            for name, form in forms.items():
                out = torch.empty(tokens, width, dtype=x.dtype, device=device)
                getattr(torch.ops._C, name)(out, x)
                expected = form(x[:, :width].double()) * x[:, width:].double()
                limits = silu if name == "silu_and_mul" else ROUNDINGS
                yield rounded(f"{name} {tokens}x{width} {dtype}", out, expected, dtype, limits)


def turned(x: "Tensor", cosine: "Tensor", sine: "Tensor", is_neox: bool) -> "Tensor":
    """Rotate pairs of columns: a half with the other (neox), or even with odd ones (gptj)."""
    import torch

    one, other = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
    parts = (one * cosine - other * sine, other * cosine + one * sine)
    return torch.cat(parts, dim=-1) if is_neox else torch.stack(parts, dim=-1).flatten(-2)


def rotary(ops: ModuleType, device: str) -> Iterator[Case]:
    import torch

    for dtype in DTYPES:
        for tokens, heads, size, turning in ((7, 4, 64, 64), (33, 8, 128, 64)):
            frequencies = torch.arange(0, turning, 2, dtype=torch.float64) / turning
            angles = torch.arange(512, dtype=torch.float64)[:, None] / 10000**frequencies
            cache = torch.cat([angles.cos(), angles.sin()], dim=-1)
            cache = cache.to(getattr(torch, dtype)).to(device)
            positions = torch.randint(0, 512, (tokens,), device=device)
            cosine, sine = (half.double()[:, None] for half in cache[positions].chunk(2, dim=-1))
            for is_neox in (True, False):
                query, key = (
                    drawn(tokens, count * size, dtype=dtype, device=device)
                    for count in (heads, heads // 2)
                )
                wanted = [x.double().view(tokens, -1, size).clone() for x in (query, key)]
                for x in wanted:
                    x[..., :turning] = turned(x[..., :turning].clone(), cosine, sine, is_neox)
                ops.rotary_embedding(positions, query, key, size, cache, is_neox)
                style = "neox" if is_neox else "gptj"
                for name, found, expected in zip(
                    ("query", "key"), (query, key), wanted, strict=True
                ):
                    yield rounded(
                        f"rotary {name} {tokens}x{heads}x{size} {style} {dtype}",
                        found.view(tokens, -1, size),
                        expected,
                        dtype,
                    )


# Requests of a batch: new tokens and all tokens. Decode, prefill and the rest of a prompt; across
# blocks and within one block. Kernels take another path where every request decodes one token.
Requests = tuple[tuple[int, int], ...]
BATCHES: dict[str, Requests] = {
    "mixed": ((1, 5), (1, 300), (40, 40), (130, 257)),
    "decode": ((1, 1), (1, 5), (1, 129), (1, 300), (1, 257)),
}
CPU_BLOCK, CUDA_BLOCK = 128, 16


@dataclass(frozen=True)
class Batch:
    """The requests of one attention call, concatenated, and their slots in a paged cache.

    `table` has the blocks of each request, `slots` the place of each token, `count` all blocks.
    """

    requests: Requests
    query: "Tensor"
    keys: "Tensor"
    values: "Tensor"
    slots: "Tensor"
    table: "Tensor"
    count: int
    scale: float
    window: int


def paged(requests: Requests, block: int, device: str) -> tuple["Tensor", "Tensor", int]:
    """Return a table of shuffled blocks, the slots of all tokens, and the count of blocks."""
    import torch

    most = max(-(-seen // block) for _, seen in requests)
    count = len(requests) * most + 3
    table = torch.randperm(count)[: len(requests) * most].view(len(requests), most)
    slots = [
        torch.tensor([int(table[row, i // block]) * block + i % block for i in range(seen)])
        for row, (_, seen) in enumerate(requests)
    ]
    return table.to(torch.int32).to(device), torch.cat(slots).to(device), count


def attended(
    query: "Tensor", keys: "Tensor", values: "Tensor", scale: float, window: int
) -> "Tensor":
    """Return causal attention of one request in float64, limited to a window above 0 tokens."""
    import torch

    new, seen, share = query.shape[0], keys.shape[0], query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(share, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    back = torch.arange(seen - new, seen)[:, None] - torch.arange(seen)[None, :]
    hidden = (back < 0) | (back >= window) if window > 0 else back < 0
    return torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(hidden.to(scores.device), -math.inf).softmax(-1), values
    )


def attention(ops: ModuleType, device: str) -> Iterator[Case]:
    """Paged attention over a cache that its own operator fills: a slot off by one shows in both."""
    import torch

    attend, block = (on_cuda, CUDA_BLOCK) if device == "cuda" else (on_cpu, CPU_BLOCK)
    shapes = ((4, 2, 64, 0), (8, 1, 128, 0), (4, 4, 64, 48))
    # FlashAttention has no float32.
    dtypes = DTYPES if device == "cpu" else ("bfloat16",)
    for dtype, (heads, kv_heads, size, window), (kind, requests) in itertools.product(
        dtypes, shapes, BATCHES.items()
    ):
        table, slots, count = paged(requests, block, device)
        queries = [drawn(new, heads, size, dtype=dtype, device=device) for new, _ in requests]
        keys, values = (
            [drawn(seen, kv_heads, size, dtype=dtype, device=device) for _, seen in requests]
            for _ in range(2)
        )
        query, key, value = (torch.cat(rows) for rows in (queries, keys, values))
        scale = size**-0.5
        out = attend(ops, Batch(requests, query, key, value, slots, table, count, scale, window))
        expected = [
            attended(*request, scale, window) for request in zip(queries, keys, values, strict=True)
        ]
        by = f"FlashAttention {flash_attention(size)}" if device == "cuda" else "attention"
        name = f"{by} {heads}/{kv_heads}x{size} window {window} {kind} {dtype}"
        yield rounded(name, out, torch.cat(expected), dtype, ATTENTION_ROUNDINGS)


def _lengths(requests: Requests, device: str) -> tuple["Tensor", "Tensor"]:
    """Return the offsets of the requests in the query, and their lengths with the cache."""
    import torch

    new = torch.tensor([new for new, _ in requests], dtype=torch.int32, device=device)
    seen = torch.tensor([seen for _, seen in requests], dtype=torch.int32, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    return torch.cat([zero, new.cumsum(0).to(torch.int32)]), seen


def on_cpu(ops: ModuleType, batch: Batch) -> "Tensor":
    import torch
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    query, keys = batch.query, batch.keys
    kv_heads, size = keys.shape[1:]
    isa = _get_attn_isa(query.dtype, CPU_BLOCK, size)
    cache = torch.zeros(batch.count, kv_heads, 2 * CPU_BLOCK, size, dtype=query.dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, batch.values, key_cache, value_cache, batch.slots, isa)
    starts, seen = _lengths(batch.requests, "cpu")
    window = batch.window or -1
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(batch.requests),
        num_heads=query.shape[1],
        num_kv_heads=kv_heads,
        head_dim=size,
        seq_lens=seen,
        dtype=query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=window,
        isa=isa,
        enable_kv_split=True,
    )
    out = torch.empty_like(query)
    caches = (query, key_cache, value_cache, out)
    form = (starts, seen, batch.scale, True, None, window, batch.table, 0, plan, None)
    ops.cpu_attention_with_kv_cache(*caches, *form)
    return out


def flash_attention(size: int) -> int | None:
    """Return the version that vLLM's backend chooses (FlashAttentionImpl) for a size of heads: 3 on
    Hopper, for example, where the default of flash_attn_varlen_func is 2. It refuses None.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version: int | None = get_flash_attn_version(head_size=size)
    return version


def on_cuda(ops: ModuleType, batch: Batch) -> "Tensor":
    import torch
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    keys, window = batch.keys, batch.window
    cache = torch.zeros(
        2, batch.count, CUDA_BLOCK, *keys.shape[1:], dtype=batch.query.dtype, device="cuda"
    )
    one = torch.ones((), device="cuda")
    ops.reshape_and_cache_flash(
        keys, batch.values, cache[0], cache[1], batch.slots, "auto", one, one
    )
    starts, seen = _lengths(batch.requests, "cuda")
    return flash_attn_varlen_func(
        q=batch.query,
        k=cache[0],
        v=cache[1],
        cu_seqlens_q=starts,
        seqused_k=seen,
        max_seqlen_q=max(new for new, _ in batch.requests),
        max_seqlen_k=max(tokens for _, tokens in batch.requests),
        softmax_scale=batch.scale,
        causal=True,
        block_table=batch.table,
        window_size=[window - 1, 0] if window else [-1, -1],
        fa_version=flash_attention(keys.shape[2]),
    )


def quantized(ops: ModuleType, device: str) -> Iterator[Case]:
    """Products of 8-bit numbers with scales: exact but for the last rounding on any processor."""
    product = fp8_product if device == "cuda" else int8_product
    for rows, inner, columns in ((7, 256, 512), (33, 2880, 128)):
        yield from product(ops, rows, inner, columns)


def int8_product(ops: ModuleType, rows: int, inner: int, columns: int) -> Iterator[Case]:
    import torch

    if not hasattr(torch.ops._C, "onednn_scaled_mm"):
        raise Absent("this build has no oneDNN")
    a = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
    b = torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
    scale_a, scale_b = (torch.rand(*shape) * 0.01 + 1e-3 for shape in ((rows, 1), (1, columns)))
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    handler = ops.create_onednn_scaled_mm(b.t(), scale_b, torch.bfloat16, True, False)
    ops.onednn_scaled_mm(handler, a, out, scale_a, None, None, None)
    expected = (a.double() * scale_a.double()) @ (b.double() * scale_b.double().t()).t()
    yield rounded(f"scaled_mm {rows}x{inner}x{columns}", out, expected, "bfloat16")


def fp8_product(ops: ModuleType, rows: int, inner: int, columns: int) -> Iterator[Case]:
    import torch

    capability = int("".join(map(str, torch.cuda.get_device_capability())))
    if not ops.cutlass_scaled_mm_supports_fp8(capability):
        raise Absent("this GPU has no matrix product of FP8")
    given = drawn(rows, inner, dtype="bfloat16", device="cuda")
    weight = drawn(columns, inner, dtype="bfloat16", device="cuda")
    a, scale_a = ops.scaled_fp8_quant(given, use_per_token_if_dynamic=True)
    b, scale_b = ops.scaled_fp8_quant(weight)
    expected = given.double() / scale_a.double()
    difference = ((a.double() - expected).abs() / expected.abs().clamp(min=0.1)).max().item()
    # FP8 (e4m3) has three bits behind the point: half of one is 1/16 of the number.
    yield f"scaled_fp8_quant {rows}x{inner}", difference, 1 / 16
    out = ops.cutlass_scaled_mm(a, b.t(), scale_a, scale_b, torch.bfloat16)
    expected = (a.double() * scale_a.double()) @ (b.double() * scale_b.double()).t()
    yield rounded(f"scaled_mm {rows}x{inner}x{columns}", out, expected, "bfloat16")


def moe(ops: ModuleType, device: str) -> Iterator[Case]:
    import torch

    for tokens, hidden, inner, experts, chosen in ((1, 128, 256, 4, 2), (33, 256, 128, 8, 4)):
        x = drawn(tokens, hidden, dtype="bfloat16", device=device)
        w13 = drawn(experts, 2 * inner, hidden, dtype="bfloat16", device=device, scale=hidden**-0.5)
        w2 = drawn(experts, hidden, inner, dtype="bfloat16", device=device, scale=inner**-0.5)
        scores = drawn(tokens, experts, dtype="float32", device=device)
        weights, ids = scores.double().softmax(-1).topk(chosen)
        expected = mixed(x, w13, w2, weights, ids)
        if device == "cpu":
            out = torch.empty_like(x)
            packed = [ops.cpu_prepack_moe_weight(w, "vec") for w in (w13, w2)]
            ops.cpu_fused_moe(
                out, x, *packed, None, None, weights.float(), ids.to(torch.int32), "silu", "vec"
            )
        else:
            from vllm.model_executor.layers.fused_moe import fused_experts

            found = torch.empty(tokens, chosen, device=device)
            found_ids, rows = (
                torch.empty(tokens, chosen, dtype=torch.int32, device=device) for _ in range(2)
            )
            ops.topk_softmax(found, found_ids, rows, scores)
            yield rounded(f"topk_softmax {tokens}x{experts}", found, weights, "float32")
            wrong = float((found_ids != ids).sum().item())
            yield f"topk_softmax's choice {tokens}x{experts}", wrong, 0.5
            out = fused_experts(x, w13, w2, found, found_ids)
        name = f"fused_moe {tokens}x{hidden}x{inner}, {chosen} of {experts}"
        yield rounded(name, out, expected, "bfloat16")


def mixed(x: "Tensor", w13: "Tensor", w2: "Tensor", weights: "Tensor", ids: "Tensor") -> "Tensor":
    """Return the weighted sum of the chosen experts' outputs in float64."""
    import torch
    from torch.nn import functional

    expected = torch.zeros(*x.shape, dtype=torch.float64, device=x.device)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            # The kernel rounds here, too, because it multiplies in bfloat16.
            middle = (functional.silu(gate) * up).to(torch.bfloat16).double()
            expected[token] += weight * (w2[expert].double() @ middle)
    return expected


GROUPS: dict[str, Group] = {
    group.__name__: group for group in (norm, activation, rotary, attention, quantized, moe)
}


def judged(group: Group, ops: ModuleType, device: str) -> dict[str, object]:
    """Run all cases of a group, after a request for the CPU's matrix tiles, without which no kernel
    may use them (arch_prctl(2), XCOMP_PERM).
    """
    import torch

    torch.manual_seed(0)
    if device == "cpu" and hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()
    times = [time.monotonic()]
    try:
        cases = list(group(ops, device))
    except Absent as exc:
        return {"skipped": str(exc)}
    times.append(time.monotonic())
    # Only a first run loads and compiles kernels: Triton, FlashInfer, and the driver, from PTX.
    list(group(ops, device))
    times.append(time.monotonic())
    rows = [
        # JSON has no infinity.
        {"case": case, "difference": found if math.isfinite(found) else None, "limit": limit}
        for case, found, limit in cases
    ]
    return {"rows": rows, "first_s": round(2 * times[1] - times[0] - times[2], 3)}


def in_child(group: Group, ops: ModuleType, device: str) -> dict[str, object]:
    """Run a group in a forked child. The error is what ended the child, if it sent no answer."""
    started = time.monotonic()

    def sentence_of(exc: BaseException) -> str:
        traceback.print_exception(exc)
        return str(document.sentence(exc))

    child = document.Child(
        lambda: judged(group, ops, device), timeout_s=GROUP_TIMEOUT_S, sentence_of=sentence_of
    )
    result = child.result()
    record = {"error": result.get("error"), "skipped": None, "rows": [], **result.get("value", {})}
    return {**record, "seconds": round(time.monotonic() - started, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare compiled operators with plain torch.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # As with `python -c`: this probe's folder is no place to import from.
    if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
        sys.path[0] = ""
    import torch
    from vllm.platforms import current_platform

    if hasattr(current_platform, "import_kernels"):
        current_platform.import_kernels()
    from vllm import _custom_ops as ops

    groups = {name: in_child(group, ops, arguments.device) for name, group in GROUPS.items()}
    document = {"schema": SCHEMA, "error": None, "torch": torch.__version__, "groups": groups}
    print(json.dumps(document), file=out, flush=True)


if __name__ == "__main__":
    main()
