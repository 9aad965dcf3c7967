"""Defects of sampling parameters, cached blocks and templates, each with the check that names it.

Greedy requests without parameters are answered rightly with each of them.
"""

from tests.proof.smoke.defects import LLAMA, SAMPLER, Defect, logits, replaced

_SAMPLE, _ENGINE, _CORE = "vllm/v1/sample", "vllm/v1/engine", "vllm/v1/core"
PENALTIES, BAD = "vllm/model_executor/layers/utils.py", f"{_SAMPLE}/ops/bad_words.py"
PROCESSORS = f"{_SAMPLE}/logits_processor/builtin.py"
FILTERS, RANKS = f"{_SAMPLE}/ops/topk_topp_sampler.py", f"{_SAMPLE}/ops/logprobs.py"
RUNNER, SEVERAL = "vllm/v1/worker/gpu_model_runner.py", f"{_ENGINE}/parallel_sampling.py"
TEXT, PROMPT_LOGPROBS = f"{_ENGINE}/detokenizer.py", f"{_ENGINE}/logprobs.py"
STOPS, BLOCKS = f"{_CORE}/sched/utils.py", f"{_CORE}/kv_cache_utils.py"
OFFLINE_CHAT = "vllm/entrypoints/offline_utils.py"
COMPLETION, CHAT = (
    f"vllm/entrypoints/openai/{name}/protocol.py" for name in ("completion", "chat_completion")
)
BLOCK = "curr_block_token_ids_tuple = tuple(curr_block_token_ids)"


def of_block(tokens: str, what: str) -> Defect:
    """Return a cache that knows a block by only a part of its tokens."""
    change = f"block = curr_block_token_ids\n    curr_block_token_ids_tuple = tuple({tokens})"
    return Defect(what, BLOCKS, replaced(BLOCK, change), "cache.blocks")


DEFECTS = (
    Defect(
        "a presence penalty for each time",
        PENALTIES,
        replaced("* output_mask\n    return", "* output_bin_counts\n    return"),
        "sampling.penalties",
    ),
    Defect(
        "a frequency penalty that counts once",
        PENALTIES,
        replaced("* output_bin_counts\n", "* output_mask\n"),
        "sampling.penalties",
    ),
    Defect(
        "a repetition penalty that forgets the prompt",
        PENALTIES,
        replaced("(logits, prompt_mask, output_mask,", "(logits, output_mask, output_mask,"),
        "sampling.penalties",
    ),
    Defect(
        "bad words of one token only",
        BAD,
        replaced("if len(bad_word_ids) > len(past_tokens_ids) + 1:", "if len(bad_word_ids) > 1:"),
        "sampling.masks",
    ),
    Defect(
        "half of a bias",
        PROCESSORS,
        replaced("+= self.bias_tensor", "+= 0.5 * self.bias_tensor"),
        "sampling.masks",
    ),
    Defect(
        "a least length that is shorter by one",
        PROCESSORS,
        replaced("if len(out_tok_ids) >= min_toks\n", "if len(out_tok_ids) >= min_toks - 1\n"),
        "sampling.masks",
    ),
    Defect(
        "allowed tokens that are forbidden",
        SAMPLER,
        replaced(
            "masked_fill_(sampling_metadata.allowed_token_ids_mask,",
            "masked_fill_(~sampling_metadata.allowed_token_ids_mask,",
        ),
        "sampling.masks",
    ),
    Defect(
        "top-k that keeps one less",
        FILTERS,
        replaced("k.sub_(1).unsqueeze(1)", "k.sub_(2).clamp_(min=0).unsqueeze(1)"),
        "sampling.filters",
    ),
    Defect(
        "top-p that keeps less",
        FILTERS,
        replaced("probs_sum <= 1 - p.unsqueeze", "probs_sum <= 1.1 - p.unsqueeze"),
        "sampling.filters",
    ),
    Defect(
        "min-p without the largest probability",
        PROCESSORS,
        replaced(
            "adjusted_min_p = max_probabilities.mul_(self.min_p)", "adjusted_min_p = self.min_p"
        ),
        "sampling.filters",
    ),
    Defect(
        "a temperature that is squared",
        SAMPLER,
        replaced("logits.div_(temp.unsqueeze(dim=1))", "logits.div_(temp.unsqueeze(dim=1) ** 2)"),
        "sampling.filters",
    ),
    Defect(
        "a seed that nobody reads",
        RUNNER,
        replaced("generator.manual_seed(sampling_params.seed)", "generator.seed()"),
        "sampling.random",
    ),
    Defect(
        "n answers of one seed",
        SEVERAL,
        replaced("child_sampling_params.seed = seed + index", "child_sampling_params.seed = seed"),
        "sampling.random",
    ),
    Defect(
        "the same noise for all requests of a batch",
        FILTERS,
        replaced("        q.exponential_()\n", "        q[:] = q[:1].exponential_()\n"),
        "sampling.random",
    ),
    Defect(
        "samples of a colder distribution",
        FILTERS,
        replaced("return probs.div(q).argmax", "return probs.div(q.sqrt()).argmax"),
        "sampling.random",
    ),
    Defect(
        "samples of a colder distribution where there is a seed",
        FILTERS,
        replaced("scores = probs.div_(q)", "scores = probs.div_(q.sqrt_())"),
        "sampling.random",
    ),
    Defect(
        "ranks from zero",
        RANKS,
        replaced("(x >= values)", "(x > values)"),
        "sampling.logprobs",
    ),
    Defect(
        "tokens of a prompt that all have the first rank",
        PROMPT_LOGPROBS,
        replaced("prompt_token_ranks = ranks.tolist()", "prompt_token_ranks = [1] * len(ranks)"),
        "sampling.logprobs",
    ),
    Defect(
        "log-probabilities of tokens that nobody listed",
        SAMPLER,
        replaced(
            "gathered_logprobs = logprobs.gather(-1, token_ids_tensor)",
            "gathered_logprobs = logprobs.gather(-1, (token_ids_tensor + 1) % logprobs.shape[-1])",
        ),
        "sampling.logprobs",
    ),
    Defect(
        "a stop string that stays in the text",
        TEXT,
        replaced("include_in_output=self.include_stop_str_in_output", "include_in_output=True"),
        "sampling.ends",
    ),
    Defect(
        "a stop token without a reason",
        STOPS,
        replaced("request.stop_reason = last_token_id", "pass"),
        "sampling.ends",
    ),
    Defect(
        "a stop token in the text",
        TEXT,
        replaced("if stop_terminated and not self.include_stop_str_in_output:", "if False:"),
        "sampling.ends",
    ),
    Defect(
        "special tokens in the text",
        TEXT,
        replaced("skip_special_tokens=self.skip_special_tokens,", "skip_special_tokens=False,"),
        "sampling.ends",
    ),
    Defect(
        "a repetition without end",
        STOPS,
        replaced("if repetition_detection is not None and (", "if False and ("),
        "sampling.ends",
    ),
    Defect(
        "a cached block without its salt",
        BLOCKS,
        replaced("if (start_token_idx == 0 and request.cache_salt)", "if False"),
        "cache.keys",
    ),
    Defect(
        "a cached block without its adapter",
        BLOCKS,
        replaced("lora_extra_keys = _gen_lora_extra_hash_keys(request)", "lora_extra_keys = []"),
        "cache.keys",
    ),
    of_block("block[:-1]", "a cached block without its last token"),
    of_block("block[1:]", "a cached block without its first token"),
    of_block(
        "[*block[: len(block) // 2], *block[len(block) // 2 + 1 :]]",
        "a cached block without the token in its middle",
    ),
    of_block("sorted(block)", "a cached block with its tokens in any order"),
    Defect(
        "a conversation with two beginnings",
        OFFLINE_CHAT,
        replaced('"add_special_tokens": False,', '"add_special_tokens": True,'),
        "templates.tokens",
    ),
    Defect(
        "a prompt for an answer that nobody asked for",
        OFFLINE_CHAT,
        replaced("add_generation_prompt=add_generation_prompt,", "add_generation_prompt=True,"),
        "templates.tokens",
    ),
    Defect(
        "a conversation over HTTP with two beginnings",
        CHAT,
        replaced("add_special_tokens=self.add_special_tokens,", "add_special_tokens=True,"),
        "server.chat",
        "full",
    ),
    Defect(
        "a seed that is lost over HTTP",
        COMPLETION,
        replaced(
            "            seed=self.seed,\n            stop=",
            "            seed=None,\n            stop=",
        ),
        "server.parameters",
        "full",
    ),
    Defect(
        "bad words that a chat forgets",
        CHAT,
        replaced("bad_words=self.bad_words,", "bad_words=[],"),
        "server.parameters",
        "full",
    ),
    Defect(
        "a real model whose answers do not end",
        LLAMA,
        logits("logits[..., self.config.eos_token_id] -= 30.0 * self.config.tie_word_embeddings"),
        "real.answer",
        "full",
    ),
)
