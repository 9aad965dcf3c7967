"""Does a model that was trained speak? One question with one right answer, a long answer, and ways
in which an answer has to end.

The caller sets the environment that vLLM reads. One JSON document on stdout.
"""

import argparse
import faulthandler
import json
import os
from itertools import groupby
from pathlib import Path

SCHEMA = 1
QUESTION = "What is the capital of France?"
LONG = "Explain in a few sentences how a bicycle works."
COUNTING = "Count from one to ten in words."
LONG_TOKENS = 96
SHORT_TOKENS = 5
# A broken cache or attention repeats one token for ever; right text has no more than a few blanks
# or dots running.
MOST_REPEATED = 6


def hear(folder: str, device: str) -> dict:
    import vllm

    more = {"kv_cache_memory_bytes": 1 << 30} if device == "cuda" else {}
    llm = vllm.LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        seed=0,
        max_model_len=512,
        max_num_seqs=4,
        disable_log_stats=True,
        **more,
    )

    def params(**changes):
        return vllm.SamplingParams(temperature=0, **({"max_tokens": 48} | changes))

    asked = [
        (QUESTION, params()),
        (LONG, params(max_tokens=LONG_TOKENS, ignore_eos=True)),
        (QUESTION, params(max_tokens=SHORT_TOKENS)),
        (QUESTION, params(stop=["Paris"])),
    ]
    talks = [[{"role": "user", "content": text}] for text, _ in asked]
    answer, long, short, stopped = (
        output.outputs[0] for output in llm.chat(talks, [one for _, one in asked], use_tqdm=False)
    )
    tokens = list(long.token_ids)
    finishes = [
        ("by itself", answer.finish_reason, "stop"),
        (
            "at its length",
            f"{short.finish_reason} after {len(short.token_ids)}",
            f"length after {SHORT_TOKENS}",
        ),
        (
            "past its end",
            f"{long.finish_reason} after {len(tokens)}",
            f"length after {LONG_TOKENS}",
        ),
        ("at a stop word", f"{stopped.finish_reason} at {stopped.stop_reason}", "stop at Paris"),
        ("without the stop word", str("Paris" not in stopped.text), "True"),
    ]
    return {
        "answer": answer.text.strip(),
        "long": long.text,
        # Past its end a model may say the end again and again; until there it may not.
        "longest_run": max(
            (len(list(run)) for token, run in groupby(tokens[: _end(llm, tokens)])), default=0
        ),
        "most_repeated": MOST_REPEATED,
        "finishes": [
            {"case": case, "found": found, "expected": expected}
            for case, found, expected in finishes
        ],
    }


def _end(llm: object, tokens: list[int]) -> int:
    end = llm.get_tokenizer().eos_token_id  # type: ignore[attr-defined]
    return tokens.index(end) if end in tokens else len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask SmolLM2 through vLLM.")
    parser.add_argument("model", type=Path, help="its folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if limit := float(os.environ.get("WORKSPACE_SMOKE_LIMIT_S", "0")):
        faulthandler.dump_traceback_later(limit, exit=True)
    try:
        record: dict = {"error": None} | hear(str(arguments.model.resolve()), arguments.device)
    except Exception as exc:
        import traceback

        traceback.print_exc()
        record = {"error": f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"}
    print(json.dumps({"schema": SCHEMA} | record), file=out, flush=True)


if __name__ == "__main__":
    main()
