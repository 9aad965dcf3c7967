"""Check that a trained model answers as in the document of `reference.py --chats`, gives a long
answer without repetition, and answers that end as requested; or generate one token and sample
another with a model of noise.

The caller sets the environment that vLLM reads. One JSON document on stdout; `--first-token` prints
`@ STAGE` before each stage to stderr.
"""

import argparse
import json
import os
import sys
from itertools import groupby
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, SamplingParams

document = SimpleNamespace(**run_path(str(Path(__file__).with_name("document.py"))))
SCHEMA = 1
PROMPT = "What is the capital of France?"
LONG_PROMPT = "Explain in a few sentences how a bicycle works."
LONG_TOKENS = 96
SHORT_TOKENS = 5
# A broken cache or attention repeats one token without end; right text has no more than a few
# blanks or dots in a row.
MOST_REPEATED = 6

# A model of noise: attention in the head size and, on a GPU, the type that most models have, so
# that the driver compiles what they need.
NOISE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def load(folder: str, device: str) -> "LLM":
    import vllm

    options = document.engine_options(folder, device) | {"max_model_len": 512, "max_num_seqs": 4}
    more = {"kv_cache_memory_bytes": 1 << 30} if device == "cuda" else {}
    return vllm.LLM(**(options | more))


def answers(llm: "LLM") -> list["CompletionOutput"]:
    """Return an answer, a long one, one cut at its length, and one cut at a stop word."""
    import vllm

    def params(**changes: object) -> "SamplingParams":
        return vllm.SamplingParams(**({"temperature": 0, "max_tokens": 48} | changes))

    requests = [
        (PROMPT, params()),
        (LONG_PROMPT, params(max_tokens=LONG_TOKENS, ignore_eos=True)),
        (PROMPT, params(max_tokens=SHORT_TOKENS)),
        (PROMPT, params(stop=["Paris"])),
    ]
    talks = [[{"role": "user", "content": text}] for text, _ in requests]
    outputs = llm.chat(talks, [sampling for _, sampling in requests], use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def compared(llm: "LLM", expected: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Return how many of the reference's first tokens each answer has, and how far its second
    choice was behind where they part (nats).
    """
    import vllm

    rows: list[dict[str, object]] = []
    for row in expected:
        tokens = row["tokens"]
        greedy = vllm.SamplingParams(temperature=0, max_tokens=len(tokens), ignore_eos=True)
        talk = [{"role": "user", "content": row["text"]}]
        (output,) = llm.chat(talk, greedy, use_tqdm=False)
        pairs = zip(tokens, output.outputs[0].token_ids, strict=True)
        equal = next((i for i, (one, other) in enumerate(pairs) if one != other), len(tokens))
        rows.append(
            {
                "text": row["text"],
                "same_prompt": row["prompt"] == list(output.prompt_token_ids),
                "equal": equal,
                "total": len(tokens),
                "parting": row["margins"][equal] if equal < len(tokens) else None,
            }
        )
    return rows


def examine(folder: str, device: str, against: Path) -> dict[str, object]:
    reference = json.loads(against.read_text(encoding="utf-8"))
    expected = reference["models"].get("smollm2")
    if not expected:
        raise RuntimeError(f"Hugging Face: {reference.get('error') or 'no answer'}")
    llm = load(folder, device)
    answer, long, short, stopped = answers(llm)
    tokens = list(long.token_ids)
    past_end = f"{long.finish_reason} after {len(tokens)}"
    at_length = f"{short.finish_reason} after {len(short.token_ids)}"
    finishes = [
        ("by itself", answer.finish_reason, "stop"),
        ("at its length", at_length, f"length after {SHORT_TOKENS}"),
        ("past its end", past_end, f"length after {LONG_TOKENS}"),
        ("at a stop word", f"{stopped.finish_reason} at {stopped.stop_reason}", "stop at Paris"),
        ("without the stop word", str("Paris" not in stopped.text), "True"),
    ]
    # Past its end a model may repeat its last token; until there it may not.
    runs = [len(list(run)) for _, run in groupby(tokens[: _end(llm, tokens)])]
    return {
        "compared": compared(llm, expected),
        "answer": answer.text.strip(),
        "long": long.text,
        "longest_run": max(runs, default=0),
        "most_repeated": MOST_REPEATED,
        "finishes": [
            {"case": case, "found": found, "expected": expected}
            for case, found, expected in finishes
        ],
    }


def _end(llm: "LLM", tokens: list[int]) -> int:
    end = llm.get_tokenizer().eos_token_id
    return tokens.index(end) if end in tokens else len(tokens)


def first_token(folder: Path, device: str) -> dict[str, object]:
    """Write the configuration of a model of noise into a folder; generate and sample a token."""
    (folder / "config.json").write_text(json.dumps(NOISE), encoding="utf-8")
    print("@ importing vllm", file=sys.stderr, flush=True)
    import vllm

    print("@ starting the engine", file=sys.stderr, flush=True)
    llm = vllm.LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16" if device == "cuda" else "float32",
        enforce_eager=True,
        seed=0,
        max_model_len=64,
        max_num_seqs=1,
        # Other programs may hold most of the memory.
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 26,
        disable_log_stats=True,
    )
    prompt: Any = {"prompt_token_ids": [2, 3, 4]}

    def generate(stage: str, **changes: object) -> int:
        print(f"@ {stage}", file=sys.stderr, flush=True)
        wanted = vllm.SamplingParams(
            **({"max_tokens": 1, "ignore_eos": True, "detokenize": False} | changes)
        )
        (output,) = llm.generate([prompt], wanted, use_tqdm=False)
        return int(output.outputs[0].token_ids[0])

    # On a GPU the first sampled token waits for FlashInfer's sampler, which most chats use: vLLM
    # takes it for a request without a seed (v1/sample/ops/topk_topp_sampler.py, forward_cuda).
    return {
        "token": generate("generating a token", temperature=0),
        "sampled": generate("sampling a token", temperature=1, top_k=8, top_p=0.9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Prompt SmolLM2 through vLLM.")
    parser.add_argument("model", type=Path, help="its folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--against", type=Path, metavar="FILE", help="of reference.py --chats")
    parser.add_argument(
        "--first-token",
        action="store_true",
        help="instead, write a model of noise into the folder; generate and sample a token",
    )
    arguments = parser.parse_args()
    if not (arguments.first_token or arguments.against):
        parser.error("--against is missing")
    record: dict[str, object] = {"schema": SCHEMA, "error": None}
    with document.printed(record):
        if arguments.first_token:
            record |= first_token(arguments.model.resolve(), arguments.device)
        else:
            os.environ |= document.FLOAT32
            record |= examine(str(arguments.model.resolve()), arguments.device, arguments.against)


if __name__ == "__main__":
    main()
