"""Every check there is: its identifier, what it judges, from which level on, what it needs, and the way on where it fails.

Identifiers are stable: records of different days are compared by them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["quick", "full"]
# What a machine may lack. A check that is skipped although it lacks nothing is a failed one.
Need = Literal["gpu", "architectures"]

_ANEW = "rm .vllm/.workspace/vllm.json && ./scripts/inv bootstrap   # takes the compiled libraries anew"
_DIFFERS = "git -C vendor/vllm diff refs/patches/base --stat   # what differs from the pin"
_WHO = "./scripts/inv status   # then: rm .vllm/.workspace/vllm.json && ./scripts/inv bootstrap"
_SERVER = "ls -t .workspace/smoke-server/logs   # the newest is the server's own log"
_REBUILD = "./scripts/inv rebuild   # compiles for the GPU that is here"


@dataclass(frozen=True)
class Entry:
    meaning: str
    cure: str
    level: Level = "quick"
    need: Need | None = None


# In the order in which they are shown. What explains the others comes first: the cure of the first that failed is the hint.
CATALOGUE: Mapping[str, Entry] = {
    "provenance.libraries": Entry("every compiled library is, by size and SHA-256, the one that this build or its donor brought, and none is left over", _ANEW),
    "binary.load": Entry("every compiled library is whole and loads with all symbols bound, each in a process of its own", _ANEW),
    "binary.cubins": Entry("every compiled library holds code for this GPU", _REBUILD, need="architectures"),
    "kernels.norm": Entry("RMS norms compute what plain torch computes", _DIFFERS),
    "kernels.activation": Entry("gated activations compute what plain torch computes", _DIFFERS),
    "kernels.rotary": Entry("rotary embeddings compute what plain torch computes", _DIFFERS),
    "kernels.attention": Entry("paged attention over a cache that the cache's operator filled computes what plain torch computes", _DIFFERS),
    "kernels.quantized": Entry("8-bit matrix products compute what plain torch computes", _DIFFERS, need="gpu"),
    "kernels.moe": Entry("experts compute what plain torch computes", _DIFFERS),
    "parity.llama": Entry("a tiny Llama says what Hugging Face says: the same greedy tokens and log-probabilities", _DIFFERS),
    "parity.qwen3": Entry("a tiny Qwen3 says what Hugging Face says", _DIFFERS),
    "parity.mixtral": Entry("a tiny Mixtral, with experts, says what Hugging Face says", _DIFFERS, "full"),
    "parity.model": Entry("the model of --model says what Hugging Face says", _DIFFERS),
    "parity.bfloat16": Entry("SmolLM2 in bfloat16 finds Hugging Face's tokens as probable as Hugging Face does", _DIFFERS, "full"),
    "parity.gpt-oss": Entry(
        "a tiny gpt-oss, with MXFP4 experts, sinks and a sliding window, finds Hugging Face's tokens as probable as Hugging Face does", _DIFFERS, "full", "gpu"
    ),
    "consistency.repeat": Entry("the same prompts give the same answers again", _DIFFERS),
    "consistency.batch": Entry("a prompt gives the same answer alone and in a batch", _DIFFERS),
    "consistency.parts": Entry("what a long prompt begins with is judged as it is when it stands alone", _DIFFERS),
    "consistency.chunked": Entry("a prompt that comes in chunks gives the same answer", _DIFFERS),
    "consistency.prefix": Entry("prompts that share a beginning give the same answers from the prefix cache", _DIFFERS),
    "consistency.compiled": Entry("torch.compile changes no token and no log-probability", _DIFFERS, "full"),
    "server.ready": Entry("the server of the built tree comes up, is the version that was built, and completes a token", _SERVER, "full"),
    "server.completions": Entry("/v1/completions answers what the offline engine answers, counts its tokens, stops at a word", _DIFFERS, "full"),
    "server.chat": Entry("/v1/chat/completions answers as the completion of the prompt that the template makes", _DIFFERS, "full"),
    "server.stream": Entry("a streamed answer comes in pieces that make the whole one, and ends with [DONE]", _DIFFERS, "full"),
    "server.logprobs": Entry("tokens and log-probabilities over HTTP are the offline engine's", _DIFFERS, "full"),
    "server.structured": Entry("an answer obeys a JSON schema", _DIFFERS, "full"),
    "server.bad_request": Entry("what cannot be served is refused with 4xx and a word why, and the server lives on", _DIFFERS, "full"),
    "server.concurrent": Entry("many requests at once are answered as each alone", _DIFFERS, "full"),
    "server.stop": Entry("told to end, the server leaves no process, no port and no shared memory", _SERVER, "full"),
    "provenance.import": Entry("the process that made the tokens had vLLM from vendor/vllm, with torch and CUDA as stamped", _WHO),
    "provenance.tree": Entry("vendor/vllm is, after all checks, what it was before the first", "./scripts/nox -s smoke"),
    "real.answer": Entry("SmolLM2 knows the capital of France, and says no token over and over", _DIFFERS, "full"),
    "real.finish": Entry("an answer ends where it has to: by itself, at its length, at a stop word", _DIFFERS, "full"),
}


def chosen(level: Level, *, has_model: bool) -> tuple[str, ...]:
    """The identifiers of a level, in their order."""
    return tuple(name for name, entry in CATALOGUE.items() if level in ("full", entry.level) and (has_model or name != "parity.model"))
