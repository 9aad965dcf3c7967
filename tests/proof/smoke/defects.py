"""Defects that are seeded into a built tree, each with the check or refusal that must name it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workspace.core.paths import Layout

Change = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Defect:
    """`change` turns the content of `file`, below vendor/vllm, into a defective one.

    A file that does not exist has empty content; a file that becomes empty is removed. `caught_by`
    is a check or a part of the refusal; `in_record` must be in the record, such as a frame of a
    stack.
    """

    what: str
    file: str
    change: Change
    caught_by: str
    level: str = "quick"
    timeout_s: int = 600
    in_record: str = ""

    def path(self, layout: Layout) -> Path:
        if self.file.startswith("site-packages/"):
            return next(
                layout.environment.glob("lib/python3*/site-packages")
            ) / self.file.removeprefix("site-packages/")
        return layout.vllm / self.file


def replaced(old: str, new: str) -> Change:
    """Replace text that occurs; a defect that cannot be seeded any more is an error."""

    def change(content: bytes) -> bytes:
        text = content.decode()
        assert old in text, f"{old!r} is no longer there"
        return text.replace(old, new, 1).encode()

    return change


def with_byte(offset: int, value: int) -> Change:
    def change(content: bytes) -> bytes:
        assert content[offset] != value
        return (
            content[:offset] + bytes([value]) + content[offset + 1 :]
            if offset >= 0
            else content[:offset] + bytes([value])
        )

    return change


LLAMA, QWEN3, MIXTRAL = (
    f"vllm/model_executor/models/{name}.py" for name in ("llama", "qwen3", "mixtral")
)
OPS = "vllm/_custom_ops.py"
SAMPLER, SPINLOOP = "vllm/v1/sample/sampler.py", "vllm/spinloop.abi3.so"
LOGITS = "logits = self.logits_processor(self.lm_head, hidden_states)\n        return logits"
GREEDY = "return logits.argmax(dim=-1).view(-1)"
COMPLETIONS, CHATS = (
    "vllm/entrypoints/openai/completion/serving.py",
    "vllm/entrypoints/openai/chat_completion/serving.py",
)
ENGINE = "vllm/v1/engine/core.py"
CUDA_SOURCE = "csrc/cpu/activation.cpp"

# A complete and correct vLLM that does not belong to the tree.
SHADOW = b"""from pathlib import Path
__package__, __path__ = "vllm", [str(Path(__file__).parents[4] / "vendor" / "vllm" / "vllm")]
exec((Path(__path__[0]) / "__init__.py").read_text())
"""


def logits(code: str) -> Change:
    return replaced(LOGITS, LOGITS.replace("return logits", f"{code}\n        return logits"))


def at_request(code: str) -> Change:
    """Run code when the engine process of a server gets a request.

    `self.requested` counts the requests from 1.
    """
    add = "            self.add_request(req, request_wave)\n"
    return replaced(
        add,
        '            self.requested = getattr(self, "requested", 0) + 1\n'
        f"            {code}\n{add}",
    )


def engine_starts(code: str) -> Change:
    title = "            set_process_title(process_title)\n"
    return replaced(title, f"{title}            {code}\n")


DEFECTS = (
    Defect(
        "a library with one byte changed, as of another version",
        SPINLOOP,
        with_byte(-1, 7),
        "provenance.libraries",
    ),
    # EM_AARCH64 and EM_X86_64 at e_machine (elf(5)).
    Defect(
        "a library for another architecture",
        SPINLOOP,
        lambda content: with_byte(18, 183 if content[18] == 62 else 62)(content),
        "binary.load",
    ),
    Defect(
        "a library that was cut",
        "vllm/_C.abi3.so",
        lambda content: content[: len(content) * 2 // 3],
        "kernels stale",
    ),
    Defect(
        "a library that was cut, and padded to its size",
        SPINLOOP,
        lambda content: content[: len(content) // 3].ljust(len(content), b"\0"),
        "provenance.libraries",
    ),
    Defect(
        "a library of another build that was left",
        "vllm/_C_old.abi3.so",
        lambda _: b"\x7fELF old",
        "provenance.libraries",
    ),
    Defect("a library that is missing", SPINLOOP, lambda _: b"", "kernels stale"),
    Defect(
        "a compiled source edited after the stamp",
        CUDA_SOURCE,
        lambda content: content + b"\n// edited\n",
        "kernels stale",
    ),
    Defect(
        "CMakeLists.txt edited after the stamp",
        "CMakeLists.txt",
        lambda content: content + b"\n# edited\n",
        "kernels stale",
    ),
    Defect(
        "setup.py edited after the stamp",
        "setup.py",
        lambda content: content + b"\n# edited\n",
        "install stale",
    ),
    Defect(
        "torch of another version",
        "site-packages/torch/version.py",
        replaced("__version__ = '", "__version__ = '9."),
        "torch",
    ),
    Defect(
        "an import from site-packages",
        "site-packages/vllm.py",
        lambda _: SHADOW,
        "provenance.import",
    ),
    Defect(
        "RMS norm without its weight",
        OPS,
        replaced(
            "torch.ops._C.rms_norm(out, input, weight, epsilon)",
            "torch.ops._C.rms_norm(out, input, None, epsilon)",
        ),
        "kernels.norm",
    ),
    Defect(
        "rotary embedding in the other layout",
        OPS,
        replaced(
            "query, key, head_size, cos_sin_cache, is_neox\n",
            "query, key, head_size, cos_sin_cache, not is_neox\n",
        ),
        "kernels.rotary",
    ),
    Defect(
        "a cache slot off by one",
        OPS,
        replaced(
            "value_cache,\n        slot_mapping,\n        isa,",
            "value_cache,\n        slot_mapping + 1,\n        isa,",
        ),
        "kernels.attention",
    ),
    Defect(
        "the operator's attention scale off by 1 %",
        OPS,
        replaced(
            "seq_lens,\n        scale,\n        causal,\n        alibi",
            "seq_lens,\n        scale * 1.01,\n        causal,\n        alibi",
        ),
        "kernels.attention",
    ),
    Defect(
        "the operator's attention scale off by 1 % where every request decodes",
        OPS,
        replaced(
            "seq_lens,\n        scale,\n        causal,\n        alibi",
            "seq_lens,\n        scale * (1.01 if len(query) == len(seq_lens) else 1.0),\n"
            "        causal,\n        alibi",
        ),
        "kernels.attention",
    ),
    Defect(
        "an expert routed wrongly",
        OPS,
        replaced(
            "        topk_ids,\n        skip_weighted,",
            "        (topk_ids + 1) % w13.shape[0],\n        skip_weighted,",
        ),
        "kernels.moe",
    ),
    Defect(
        "8-bit products without their scales",
        OPS,
        replaced(
            "        input_scale,\n        input_zp,",
            "        torch.ones_like(input_scale),\n        input_zp,",
        ),
        "kernels.quantized",
    ),
    Defect(
        "the model's attention scale off by 1 %",
        LLAMA,
        replaced("self.scaling = self.head_dim**-0.5", "self.scaling = 1.01 * self.head_dim**-0.5"),
        "parity.llama",
    ),
    Defect(
        "a wrong rotary base",
        "vllm/model_executor/layers/rotary_embedding/base.py",
        replaced(
            "            base\n            ** (", "            (base * 1.1)\n            ** ("
        ),
        "parity.llama",
    ),
    Defect(
        "queries that are not normalised",
        QWEN3,
        replaced("q_by_head = self.q_norm(q_by_head)", "pass"),
        "parity.qwen3",
    ),
    Defect(
        "experts that weigh 1 % too much",
        MIXTRAL,
        replaced(
            "final_hidden_states = self.experts(hidden_states, router_logits)",
            "final_hidden_states = 1.01 * self.experts(hidden_states, router_logits)",
        ),
        "parity.mixtral",
        "full",
    ),
    Defect(
        "a sampler that ignores temperature 0",
        SAMPLER,
        replaced(GREEDY, "return logits.topk(2, dim=-1).indices[:, 1]"),
        "parity.llama",
    ),
    Defect(
        "log-probabilities that are no numbers",
        LLAMA,
        logits("logits[..., 5] = float('nan')"),
        "parity.llama",
    ),
    Defect(
        "a crash in generation",
        LLAMA,
        logits("import os; os.kill(os.getpid(), 11)"),
        "parity.llama",
    ),
    Defect(
        "an exception in generation", LLAMA, logits("raise RuntimeError('seeded')"), "parity.llama"
    ),
    Defect(
        "a hang in generation",
        LLAMA,
        logits("import time; time.sleep(3000)"),
        "parity.llama",
        timeout_s=120,
        in_record="llama.py",
    ),
    Defect(
        "a hang at start",
        "vllm/v1/worker/cpu_model_runner.py",
        replaced(
            "        if load_dummy_weights:",
            "        import time; time.sleep(3000)\n        if load_dummy_weights:",
        ),
        "parity.llama",
        timeout_s=120,
        in_record="cpu_model_runner.py",
    ),
    Defect(
        "noise in every answer",
        LLAMA,
        logits("logits = logits + 0.01 * torch.rand_like(logits)"),
        "consistency.repeat",
    ),
    Defect(
        "answers of neighbours in a batch",
        LLAMA,
        logits("logits = logits.roll(1, 0)"),
        "consistency.batch",
    ),
    Defect(
        "a prefix cache that mixes requests",
        "vllm/v1/core/kv_cache_utils.py",
        replaced(
            "hash_function((parent_block_hash, curr_block_token_ids_tuple, extra_keys))",
            "hash_function((NONE_HASH, curr_block_token_ids_tuple, extra_keys))",
        ),
        "consistency.prefix",
    ),
    Defect(
        "a server that returns 200 with rubbish",
        COMPLETIONS,
        replaced("output_text = output.text\n", "output_text = output.text[::-1]\n"),
        "server.completions",
        "full",
    ),
    Defect(
        "log-probabilities over HTTP off by 1 %",
        COMPLETIONS,
        replaced(
            "token_logprob = max(step_token.logprob, -9999.0)",
            "token_logprob = 1.01 * max(step_token.logprob, -9999.0)",
        ),
        "server.logprobs",
        "full",
    ),
    Defect(
        "a stream without its end",
        COMPLETIONS,
        replaced(
            'yield f"data: {data}\\n\\n"\n        yield "data: [DONE]\\n\\n"',
            'yield f"data: {data}\\n\\n"',
        ),
        "server.stream",
        "full",
    ),
    Defect(
        "a chat that its user answers",
        CHATS,
        replaced("\n        role = self.get_chat_request_role(request)", '\n        role = "user"'),
        "server.chat",
        "full",
    ),
    Defect(
        "a schema that nobody obeys",
        "vllm/v1/worker/gpu_model_runner.py",
        replaced(
            "if grammar_output is not None:\n            apply_grammar_bitmask(",
            "if False:\n            apply_grammar_bitmask(",
        ),
        "server.structured",
        "full",
    ),
    Defect(
        "bad requests that are the server's fault",
        "vllm/entrypoints/serve/exception_handling/error_response.py",
        replaced("            code=status_code.value,", "            code=500,"),
        "server.bad_request",
        "full",
    ),
    Defect(
        "answers cut short where many stand in line",
        ENGINE,
        at_request(
            "req.max_tokens = 3 if self.scheduler.get_num_unfinished_requests() > 8 else"
            " req.max_tokens"
        ),
        "server.concurrent",
        "full",
    ),
    Defect(
        "a crash after the first request",
        ENGINE,
        at_request("import os; self.requested > 1 and os.kill(os.getpid(), 11)"),
        "server.completions",
        "full",
    ),
    Defect(
        "a hang at the server's start",
        ENGINE,
        engine_starts("import time; time.sleep(3000)"),
        "server.ready",
        "full",
        300,
        in_record=ENGINE,
    ),
    Defect(
        "a hang after the first request",
        ENGINE,
        at_request("import time; self.requested > 1 and time.sleep(3000)"),
        "server.completions",
        "full",
        300,
        in_record=ENGINE,
    ),
    Defect(
        "an engine process that outlives its server",
        ENGINE,
        engine_starts(
            "import os, signal, time; os.fork() or (os.setsid(), os.fork() and os._exit(0),"
            " signal.signal(15, signal.SIG_IGN), time.sleep(3000))"
        ),
        "server.stop",
        "full",
        in_record=ENGINE,
    ),
)
