"""Defects of tight memory, adapters, embeddings, guessed tokens and clients that leave, and what
grows or waits in a server, each with the check that names it.

Requests without adapters to a server with enough memory are answered rightly with most of them.
"""

from tests.proof.smoke.defects import Defect, replaced

_LORA, _POOLER = "vllm/lora", "vllm/model_executor/layers/pooler"
SCALES, SLOTS = f"{_LORA}/lora_weights.py", f"{_LORA}/punica_wrapper/utils.py"
LINEAR = f"{_LORA}/layers/base_linear.py"
POOLING, HEADS = f"{_POOLER}/seqwise/methods.py", f"{_POOLER}/seqwise/heads.py"
UNIT = f"{_POOLER}/activations.py"
SCHEDULER = "vllm/v1/core/sched/scheduler.py"
REJECTION, NGRAM = "vllm/v1/sample/rejection_sampler.py", "vllm/v1/spec_decode/ngram_proposer.py"
FRONT, OUTPUTS = "vllm/v1/engine/async_llm.py", "vllm/v1/engine/output_processor.py"
COMPLETION = "vllm/entrypoints/openai/completion/serving.py"
ADAPTERS, POOLED, GUESSES = "engine.adapters", "engine.pooling", "engine.speculation"


def of_engine(what: str, file: str, old: str, new: str, caught_by: str) -> Defect:
    return Defect(what, file, replaced(old, new), caught_by, "full")


def of_completion(what: str, first: str, caught_by: str) -> Defect:
    """Return a server that does something more at the beginning of each completion."""
    begins = "        if request.stream and request.use_beam_search:\n"
    return of_engine(what, COMPLETION, begins, f"        {first}\n{begins}", caught_by)


# What a defective server keeps is a new attribute of the module of time.
KEPT = "import time; kept = time.__dict__.setdefault('kept', [])"

DEFECTS = (
    of_engine(
        "an adapter without its scale",
        SCALES,
        "self.lora_b *= self.scaling",
        "pass",
        ADAPTERS,
    ),
    of_engine(
        "an adapter in its neighbour's slot",
        SLOTS,
        "        lora_id: index\n",
        "        lora_id: (index + 1) % len(lora_index_to_id)\n",
        ADAPTERS,
    ),
    of_engine(
        "an adapter for requests without any",
        SLOTS,
        "            else -1\n        )",
        "            else 0\n        )",
        ADAPTERS,
    ),
    of_engine(
        "an adapter without its last rank",
        LINEAR,
        "            lora_b, non_blocking=True",
        "            lora_b * (torch.arange(lora_b.shape[1]) < lora_b.shape[1] - 1)",
        ADAPTERS,
    ),
    of_engine(
        "a preempted request that loses its last token",
        SCHEDULER,
        "        request.num_preemptions += 1\n",
        "        request.num_preemptions += 1\n"
        "        if request._output_token_ids:\n"
        "            request._output_token_ids.pop()\n"
        "            request._all_token_ids.pop()\n",
        "engine.preemption",
    ),
    of_engine(
        "a preempted request that is not computed from its beginning",
        SCHEDULER,
        "        request.num_computed_tokens = 0\n        if request.spec_token_ids:",
        "        request.num_computed_tokens = 1\n        if request.spec_token_ids:",
        "engine.preemption",
    ),
    of_engine(
        "blocks of an aborted request that stay",
        SCHEDULER,
        "self._free_request(request, delay_free_blocks=delay_free_blocks)",
        "self._free_request(request, delay_free_blocks=True)",
        "engine.abort",
    ),
    of_engine(
        "an abort that ends one request more",
        SCHEDULER,
        "            request_ids = set(request_ids)\n",
        "            running = [each.request_id for each in self.running]\n"
        "            request_ids = {*request_ids, *running[:1]}\n",
        "engine.abort",
    ),
    of_engine(
        "a guessed token too many",
        REJECTION,
        "        target_argmax = target_logits.argmax(dim=-1)\n",
        "        target_argmax = target_logits.argmax(dim=-1)\n"
        "        ends = cu_num_draft_tokens.long() - 1\n"
        "        target_argmax[ends] = draft_token_ids[ends].to(target_argmax.dtype)\n",
        GUESSES,
    ),
    of_engine(
        "guesses that nobody makes",
        NGRAM,
        "self.valid_ngram_num_drafts[i] > 0:",
        "self.valid_ngram_num_drafts[i] > 99:",
        GUESSES,
    ),
    of_engine(
        "the first token for the last",
        POOLING,
        "hidden_states[pooling_cursor.last_token_indices_gpu]",
        "hidden_states[pooling_cursor.first_token_indices_gpu]",
        POOLED,
    ),
    of_engine(
        "the mean for the first token",
        POOLING,
        "        return CLSPool()",
        "        return MeanPool()",
        POOLED,
    ),
    of_engine(
        "a mean of one token more",
        POOLING,
        "segment_sums / prompt_lens.unsqueeze(1)",
        "segment_sums / (prompt_lens.unsqueeze(1) + 1)",
        POOLED,
    ),
    of_engine(
        "embeddings that are not normalized",
        UNIT,
        "return F.normalize(pooled_data, p=2, dim=-1)",
        "return pooled_data",
        POOLED,
    ),
    of_engine(
        "embeddings that are normalized unasked",
        HEADS,
        "                if flags[0]:",
        "                if True:",
        POOLED,
    ),
    of_engine(
        "the last numbers of an embedding for the first",
        HEADS,
        "embeddings = embeddings[..., :d]",
        "embeddings = embeddings[..., embeddings.shape[-1] - (d or embeddings.shape[-1]) :]",
        POOLED,
    ),
    of_engine(
        "a request that outlives its client",
        FRONT,
        "        except (asyncio.CancelledError, GeneratorExit):\n            if q is not None:",
        "        except (asyncio.CancelledError, GeneratorExit):\n            if False:",
        "server.abort",
    ),
    of_completion(
        "a descriptor for each request",
        "import os; os.open('/dev/null', os.O_RDONLY)",
        "server.growth",
    ),
    of_completion(
        "a thread for each request",
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "server.growth",
    ),
    of_engine(
        "a list that keeps every output",
        OUTPUTS,
        "                    req_state.queue.put(request_output)\n                else:",
        f"                    {KEPT}; kept.append(request_output)\n"
        "                    req_state.queue.put(request_output)\n                else:",
        "server.growth",
    ),
    of_engine(
        "an engine that keeps every request",
        SCHEDULER,
        "        del self.requests[request.request_id]\n",
        f"        {KEPT}; kept.append(self.requests.pop(request.request_id))\n",
        "server.growth",
    ),
    of_completion(
        "half a second in each 50th answer",
        f"{KEPT}; kept.append(0); len(kept) % 50 or time.sleep(0.5)",
        "server.pauses",
    ),
)
