"""Do the compiled operators that models use compute what plain torch computes? Each group in a
forked child: a crash is a verdict.

Differences are counted in roundings: units of the type's precision, relative to the largest value
of a reference in float64. One JSON document on stdout.
"""

import argparse
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SCHEMA = 1
GROUP_TIMEOUT_S = 300.0
# A result that is right to its type is half a unit off; what is added up in float32 on the way
# costs a few more there, where exp and tanh are polynomials too. Measured with vLLM 0.31.0 on
# x86-64: at most 2.2 in float32 and 0.65 in bfloat16. One per cent is 84,000 and 1.3.
ROUNDINGS = {"float32": 16.0, "bfloat16": 1.5}
WORDS_SHOWN = 200

Case = tuple[str, float, float]


class Absent(Exception):
    """An operator that this build does not have; its words say why."""


def units(found, expected, dtype: str) -> float:
    """The largest difference in roundings of the type; infinite where something is no number."""
    import torch

    difference = (found.double() - expected).abs().max().item() / expected.abs().max().item()
    return (
        difference / torch.finfo(getattr(torch, dtype)).eps
        if math.isfinite(difference)
        else math.inf
    )


def drawn(*shape: int, dtype: str, device: str, scale: float = 1.0):
    import torch

    return (torch.randn(*shape, device=device) * scale).to(getattr(torch, dtype))


def norm(ops, device: str, dtypes: list[str]) -> Iterator[Case]:
    import torch

    def expected(x, weight):
        x = x.double()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()

    for dtype in dtypes:
        for tokens, width in ((7, 256), (33, 2880)):
            x, residual = (drawn(tokens, width, dtype=dtype, device=device) for _ in range(2))
            weight = drawn(width, dtype=dtype, device=device) + 1
            out = torch.empty_like(x)
            ops.rms_norm(out, x, weight, 1e-6)
            yield (
                f"rms_norm {tokens}x{width} {dtype}",
                units(out, expected(x, weight), dtype),
                ROUNDINGS[dtype],
            )
            added = x.double() + residual.double()
            ops.fused_add_rms_norm(x, residual, weight, 1e-6)
            yield (
                f"fused_add_rms_norm {tokens}x{width} {dtype}",
                units(x, expected(added, weight), dtype),
                ROUNDINGS[dtype],
            )
            yield (
                f"fused_add_rms_norm's sum {tokens}x{width} {dtype}",
                units(residual, added, dtype),
                ROUNDINGS[dtype],
            )


def activation(ops, device: str, dtypes: list[str]) -> Iterator[Case]:
    import torch
    from torch.nn import functional

    forms: dict[str, Callable] = {
        "silu_and_mul": functional.silu,
        "gelu_and_mul": functional.gelu,
        "gelu_tanh_and_mul": lambda x: functional.gelu(x, approximate="tanh"),
    }
    for dtype in dtypes:
        for tokens, width in ((7, 512), (33, 2880)):
            x = drawn(tokens, 2 * width, dtype=dtype, device=device)
            for name, form in forms.items():
                out = torch.empty(tokens, width, dtype=x.dtype, device=device)
                getattr(torch.ops._C, name)(out, x)
                expected = form(x[:, :width].double()) * x[:, width:].double()
                yield (
                    f"{name} {tokens}x{width} {dtype}",
                    units(out, expected, dtype),
                    ROUNDINGS[dtype],
                )


def rotary(ops, device: str, dtypes: list[str]) -> Iterator[Case]:
    import torch

    def turned(x, cosine, sine, is_neox: bool):
        one, other = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
        parts = (one * cosine - other * sine, other * cosine + one * sine)
        return torch.cat(parts, dim=-1) if is_neox else torch.stack(parts, dim=-1).flatten(-2)

    for dtype in dtypes:
        for tokens, heads, size, turning in ((7, 4, 64, 64), (33, 8, 128, 64)):
            angles = torch.arange(512, dtype=torch.float64)[:, None] / 10000 ** (
                torch.arange(0, turning, 2, dtype=torch.float64) / turning
            )
            cache = (
                torch.cat([angles.cos(), angles.sin()], dim=-1).to(getattr(torch, dtype)).to(device)
            )
            positions = torch.randint(0, 512, (tokens,), device=device)
            cosine, sine = (half.double()[:, None] for half in cache[positions].chunk(2, dim=-1))
            for is_neox in (True, False):
                query, key = (
                    drawn(tokens, number * size, dtype=dtype, device=device)
                    for number in (heads, heads // 2)
                )
                wanted = [x.double().view(tokens, -1, size).clone() for x in (query, key)]
                for x in wanted:
                    x[..., :turning] = turned(x[..., :turning].clone(), cosine, sine, is_neox)
                ops.rotary_embedding(positions, query, key, size, cache, is_neox)
                for name, found, expected in zip(
                    ("query", "key"), (query, key), wanted, strict=True
                ):
                    said = (
                        f"rotary {name} {tokens}x{heads}x{size} {'neox' if is_neox else 'gptj'}"
                        f" {dtype}"
                    )
                    yield (
                        said,
                        units(found.view(tokens, -1, size), expected, dtype),
                        ROUNDINGS[dtype],
                    )


# Requests of one batch: how many tokens are new, how many there are in all. Decode, prefill, the
# rest of a prompt; across blocks and within one.
REQUESTS = ((1, 5), (1, 300), (40, 40), (130, 257))


def laid_out(block: int, device: str):
    """Blocks in no order, and the slot of each token of each request in them."""
    import torch

    most = max(-(-seen // block) for _, seen in REQUESTS)
    table = torch.randperm(len(REQUESTS) * most + 3)[: len(REQUESTS) * most].view(
        len(REQUESTS), most
    )
    slots = [
        torch.tensor([int(table[row, i // block]) * block + i % block for i in range(seen)])
        for row, (_, seen) in enumerate(REQUESTS)
    ]
    return (
        table.to(torch.int32).to(device),
        [one.to(device) for one in slots],
        len(REQUESTS) * most + 3,
    )


def attended(query, keys, values, scale: float, window: int):
    """Causal attention of one request in float64, `window` tokens back where that is above 0."""
    import torch

    new, seen, share = query.shape[0], keys.shape[0], query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(share, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    back = torch.arange(seen - new, seen)[:, None] - torch.arange(seen)[None, :]
    hidden = (back < 0) | (back >= window) if window > 0 else back < 0
    return torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(hidden.to(scores.device), -math.inf).softmax(-1), values
    )


def attention(ops, device: str, dtypes: list[str]) -> Iterator[Case]:
    """Paged attention over a cache that the cache's own operator has filled: a slot off by one
    shows in either.
    """
    import torch

    ask = on_cuda if device == "cuda" else on_cpu
    # FlashAttention has no float32.
    for dtype in [one for one in dtypes if device == "cpu" or one != "float32"]:
        for heads, kv_heads, size, window in ((4, 2, 64, 0), (8, 1, 128, 0), (4, 4, 64, 48)):
            table, slots, blocks = laid_out(128 if device == "cpu" else 16, device)
            queries = [drawn(new, heads, size, dtype=dtype, device=device) for new, _ in REQUESTS]
            keys, values = (
                [drawn(seen, kv_heads, size, dtype=dtype, device=device) for _, seen in REQUESTS]
                for _ in range(2)
            )
            out = ask(
                ops,
                torch.cat(queries),
                torch.cat(keys),
                torch.cat(values),
                torch.cat(slots),
                table,
                blocks,
                size**-0.5,
                window,
            )
            expected = torch.cat(
                [
                    attended(*three, size**-0.5, window)
                    for three in zip(queries, keys, values, strict=True)
                ]
            )
            # Probabilities are rounded to the type as well before they meet the values.
            yield (
                f"attention {heads}/{kv_heads}x{size} window {window} {dtype}",
                units(out, expected, dtype),
                ROUNDINGS[dtype],
            )


def _lengths(device: str):
    import torch

    new, seen = (
        torch.tensor(column, dtype=torch.int32, device=device)
        for column in zip(*REQUESTS, strict=True)
    )
    return (
        torch.cat(
            [torch.zeros(1, dtype=torch.int32, device=device), new.cumsum(0).to(torch.int32)]
        ),
        seen,
    )


def on_cpu(ops, query, keys, values, slots, table, blocks: int, scale: float, window: int):
    import torch
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, kv_heads, size = query.shape[1], keys.shape[1], query.shape[2]
    isa = _get_attn_isa(query.dtype, 128, size)
    cache = torch.zeros(blocks, kv_heads, 2 * 128, size, dtype=query.dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)
    starts, seen = _lengths("cpu")
    asked = {
        "num_reqs": len(REQUESTS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size,
        "seq_lens": seen,
        "dtype": query.dtype,
    }
    asked |= {
        "query_start_loc": starts,
        "causal": True,
        "sliding_window_size": window or -1,
        "isa": isa,
        "enable_kv_split": True,
    }
    plan = ops.cpu_attn_get_scheduler_metadata(**asked)
    out = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query,
        key_cache,
        value_cache,
        out,
        starts,
        seen,
        scale,
        True,
        None,
        window or -1,
        table,
        0,
        plan,
        None,
    )
    return out


def on_cuda(ops, query, keys, values, slots, table, blocks: int, scale: float, window: int):
    import torch
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    cache = torch.zeros(
        2, blocks, 16, keys.shape[1], keys.shape[2], dtype=query.dtype, device="cuda"
    )
    one = torch.ones((), device="cuda")
    ops.reshape_and_cache_flash(keys, values, cache[0], cache[1], slots, "auto", one, one)
    starts, seen = _lengths("cuda")
    asked = {
        "cu_seqlens_q": starts,
        "seqused_k": seen,
        "max_seqlen_q": max(new for new, _ in REQUESTS),
        "max_seqlen_k": max(all_ for _, all_ in REQUESTS),
    }
    asked |= {
        "softmax_scale": scale,
        "causal": True,
        "block_table": table,
        "window_size": [window - 1, 0] if window else [-1, -1],
    }
    return flash_attn_varlen_func(q=query, k=cache[0], v=cache[1], **asked)


def quantized(ops, device: str, dtypes: list[str]) -> Iterator[Case]:
    """Products of 8-bit numbers with scales: exact but for the last rounding, whatever the
    processor.
    """
    import torch

    for rows, inner, columns in ((7, 256, 512), (33, 2880, 128)):
        if device == "cpu":
            if not hasattr(torch.ops._C, "onednn_scaled_mm"):
                raise Absent("this build has no oneDNN")
            a, b = (
                torch.randint(-127, 128, shape, dtype=torch.int8)
                for shape in ((rows, inner), (columns, inner))
            )
            scale_a, scale_b = (
                torch.rand(rows, 1) * 0.01 + 1e-3,
                torch.rand(1, columns) * 0.01 + 1e-3,
            )
            out = torch.empty(rows, columns, dtype=torch.bfloat16)
            handler = ops.create_onednn_scaled_mm(b.t(), scale_b, torch.bfloat16, True, False)
            ops.onednn_scaled_mm(handler, a, out, scale_a, None, None, None)
        else:
            if not ops.cutlass_scaled_mm_supports_fp8(
                int("".join(map(str, torch.cuda.get_device_capability())))
            ):
                raise Absent("this GPU has no matrix product of FP8")
            given, weight = (
                drawn(*shape, dtype="bfloat16", device=device)
                for shape in ((rows, inner), (columns, inner))
            )
            (a, scale_a), (b, scale_b) = (
                ops.scaled_fp8_quant(given, use_per_token_if_dynamic=True),
                ops.scaled_fp8_quant(weight),
            )
            expected = given.double() / scale_a.double()
            # FP8 (e4m3) has three bits behind the point: half of one is 1/16 of the number.
            yield (
                f"scaled_fp8_quant {rows}x{inner}",
                ((a.double() - expected).abs() / expected.abs().clamp(min=0.1)).max().item(),
                1 / 16,
            )
            out = ops.cutlass_scaled_mm(a, b.t(), scale_a, scale_b, torch.bfloat16)
        expected = (a.double() * scale_a.double()) @ (
            b.double() * (scale_b.double().t() if device == "cpu" else scale_b.double())
        ).t()
        yield (
            f"scaled_mm {rows}x{inner}x{columns}",
            units(out, expected, "bfloat16"),
            ROUNDINGS["bfloat16"],
        )


def moe(ops, device: str, dtypes: list[str]) -> Iterator[Case]:
    import torch
    from torch.nn import functional

    for tokens, hidden, inner, experts, chosen in ((1, 128, 256, 4, 2), (33, 256, 128, 8, 4)):
        x = drawn(tokens, hidden, dtype="bfloat16", device=device)
        w13 = drawn(experts, 2 * inner, hidden, dtype="bfloat16", device=device, scale=hidden**-0.5)
        w2 = drawn(experts, hidden, inner, dtype="bfloat16", device=device, scale=inner**-0.5)
        scores = drawn(tokens, experts, dtype="float32", device=device)
        weights, ids = scores.double().softmax(-1).topk(chosen)
        expected = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
        for token in range(tokens):
            for weight, expert in zip(weights[token], ids[token], strict=True):
                gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
                # The kernel rounds here too, since it multiplies in bfloat16.
                middle = (functional.silu(gate) * up).to(torch.bfloat16).double()
                expected[token] += weight * (w2[expert].double() @ middle)
        if device == "cpu":
            out = torch.empty_like(x)
            packed = [ops.cpu_prepack_moe_weight(w, "vec") for w in (w13, w2)]
            ops.cpu_fused_moe(
                out, x, *packed, None, None, weights.float(), ids.to(torch.int32), "silu", "vec"
            )
        else:
            from vllm.model_executor.layers.fused_moe import fused_experts

            said = torch.empty(tokens, chosen, device=device)
            said_ids, rows = (
                torch.empty(tokens, chosen, dtype=torch.int32, device=device) for _ in range(2)
            )
            ops.topk_softmax(said, said_ids, rows, scores)
            yield (
                f"topk_softmax {tokens}x{experts}",
                units(said, weights, "float32"),
                ROUNDINGS["float32"],
            )
            yield (
                f"topk_softmax's choice {tokens}x{experts}",
                float((said_ids != ids).sum().item()),
                0.5,
            )
            out = fused_experts(x, w13, w2, said, said_ids)
        yield (
            f"fused_moe {tokens}x{hidden}x{inner}, {chosen} of {experts}",
            units(out, expected, "bfloat16"),
            ROUNDINGS["bfloat16"],
        )


GROUPS: dict[str, Callable[..., Iterator[Case]]] = {
    "norm": norm,
    "activation": activation,
    "rotary": rotary,
    "attention": attention,
    "quantized": quantized,
    "moe": moe,
}


def judged(group: Callable[..., Iterator[Case]], ops, device: str) -> dict:
    """All cases of a group. The processor's tiles have to be asked for before a kernel uses them
    (arch_prctl(2), XCOMP_PERM).
    """
    import torch

    torch.manual_seed(0)
    if device == "cpu" and hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()
    try:
        rows = [
            {"case": case, "difference": difference, "limit": limit}
            for case, difference, limit in group(ops, device, ["float32", "bfloat16"])
        ]
    except Absent as exc:
        return {"skipped": str(exc)}
    # JSON lacks infinity.
    return {
        "rows": [
            row | {"difference": row["difference"] if math.isfinite(row["difference"]) else None}
            for row in rows
        ]
    }


def asked(group: Callable[..., Iterator[Case]], ops, device: str) -> dict:
    """The same in a forked child, with what ended it."""
    started = time.monotonic()
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    child = fork.Process(target=_reply, args=(writer, group, ops, device))
    child.start()
    writer.close()
    try:
        if reader.poll(GROUP_TIMEOUT_S):
            said = reader.recv()
        else:
            child.kill()
            said = {"error": f"did not end within {GROUP_TIMEOUT_S:g} s"}
    except EOFError:
        child.join()
        status = child.exitcode or 0
        said = {
            "error": (
                f"killed by {signal.Signals(-status).name}"
                if status < 0
                else f"exited with {status} without a word"
            )
        }
    child.join()
    return (
        {"error": None, "skipped": None, "rows": []}
        | said
        | {"seconds": round(time.monotonic() - started, 3)}
    )


def _reply(
    writer: "multiprocessing.connection.Connection",
    group: Callable[..., Iterator[Case]],
    ops,
    device: str,
) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        writer.send(judged(group, ops, device))
    except Exception as exc:
        import traceback

        traceback.print_exc()
        writer.send({"error": f"{type(exc).__name__}: {' '.join(str(exc).split())[:WORDS_SHOWN]}"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare compiled operators with plain torch.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # As `python -c` does: the folder of this probe is no place to import from.
    if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
        sys.path[0] = ""
    import torch
    from vllm.platforms import current_platform

    if hasattr(current_platform, "import_kernels"):
        current_platform.import_kernels()
    from vllm import _custom_ops as ops

    groups = {name: asked(group, ops, arguments.device) for name, group in GROUPS.items()}
    print(
        json.dumps({"schema": SCHEMA, "error": None, "torch": torch.__version__, "groups": groups}),
        file=out,
        flush=True,
    )


if __name__ == "__main__":
    main()
