"""Defects of sampling parameters, cached blocks, templates and requests over HTTP, each with the
check that names it.

Greedy requests without parameters are answered rightly with each of them.
"""

from tests.proof.smoke.defects import (
    CHATS,
    COMPLETIONS,
    LLAMA,
    SAMPLER,
    Change,
    Defect,
    logits,
    replaced,
)

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
FORMS, BACKEND = (
    "vllm/entrypoints/generate/base/protocol.py",
    "vllm/v1/structured_output/backend_xgrammar.py",
)
CHOICES, TOKENIZE = (
    "vllm/v1/structured_output/utils.py",
    "vllm/entrypoints/serve/tokenize/protocol.py",
)
PROMPTS, RENDERER = "vllm/renderers/online_renderer.py", "vllm/renderers/base.py"
LENGTHS, PARAMS = "vllm/renderers/params.py", "vllm/sampling_params.py"
OPTIONS = "vllm/entrypoints/serve/utils/api_utils.py"
PIECES = f"{_ENGINE}/output_processor.py"
BLOCK = "curr_block_token_ids_tuple = tuple(curr_block_token_ids)"


def of_block(tokens: str, what: str) -> Defect:
    """Return a cache that knows a block by only a part of its tokens."""
    change = f"block = curr_block_token_ids\n    curr_block_token_ids_tuple = tuple({tokens})"
    return Defect(what, BLOCKS, replaced(BLOCK, change), "cache.blocks")


def over_http(what: str, file: str, change: Change, caught_by: str) -> Defect:
    """Return a defect of the server alone."""
    return Defect(what, file, change, caught_by, "full")


HTTP_DEFECTS = (
    over_http(
        "an echo without its prompt",
        COMPLETIONS,
        replaced("output_text = prompt_text + output.text", "output_text = output.text"),
        "server.echo",
    ),
    over_http(
        "a prompt with one most likely token too few",
        COMPLETIONS,
        replaced("num_output_top_logprobs >= i", "num_output_top_logprobs > i"),
        "server.echo",
    ),
    over_http(
        "a chat without the log-probabilities of its prompt",
        CHATS,
        replaced("clamp_prompt_logprobs(final_res.prompt_logprobs)", "None"),
        "server.echo",
    ),
    over_http(
        "a chat with one most likely token too few",
        CHATS,
        replaced("i < top_logprobs)", "i + 1 < top_logprobs)"),
        "server.logprobs",
    ),
    over_http(
        "a listed token that a chat leaves out",
        CHATS,
        replaced("return_all=bool(logprob_token_ids)", "return_all=False"),
        "server.logprobs",
    ),
    over_http(
        "an answer that is no JSON object",
        FORMS,
        replaced(
            'response_format.type == "text"', 'response_format.type in ("text", "json_object")'
        ),
        "server.structured",
    ),
    over_http(
        "a schema that allows any object",
        BACKEND,
        replaced(
            "                grammar_spec, any_whitespace", "                '{}', any_whitespace"
        ),
        "server.structured",
    ),
    over_http(
        "a choice without the first one",
        CHOICES,
        replaced(
            "escape_ebnf_string(c) for c in choice)", "escape_ebnf_string(c) for c in choice[1:])"
        ),
        "server.structured",
    ),
    over_http(
        "a form that a chat forgets",
        CHAT,
        replaced("structured_outputs=self.extract_structured_outputs()", "structured_outputs=None"),
        "server.structured",
    ),
    over_http(
        "a salt that is lost over HTTP",
        PROMPTS,
        replaced('("mm_processor_kwargs", "cache_salt")', '("mm_processor_kwargs",)'),
        "server.cache",
    ),
    over_http(
        "cached tokens that a stream does not count",
        COMPLETIONS,
        replaced("cached_tokens=num_cached_tokens", "cached_tokens=0"),
        "server.cache",
    ),
    over_http(
        "usage that is a piece behind",
        COMPLETIONS,
        replaced(
            "completion_tokens = previous_num_tokens[i]\n",
            "completion_tokens = previous_num_tokens[i] - len(output.token_ids)\n",
        ),
        "server.usage",
    ),
    over_http(
        "usage of the last prompt alone",
        COMPLETIONS,
        replaced(
            "total_prompt_tokens = sum(num_prompt_tokens)",
            "total_prompt_tokens = num_prompt_tokens[-1]",
        ),
        "server.usage",
    ),
    over_http(
        "usage in each piece, unasked",
        OPTIONS,
        replaced(
            "include_continuous_usage = include_usage and",
            "include_continuous_usage = include_usage or",
        ),
        "server.usage",
    ),
    over_http(
        "pieces of one token, whatever the interval",
        PIECES,
        replaced("max(sampling_params.stream_interval, stream_interval)", "stream_interval"),
        "server.usage",
    ),
    over_http(
        "a text that always gets its special tokens",
        TOKENIZE,
        replaced("add_special_tokens=self.add_special_tokens", "add_special_tokens=True"),
        "server.tokens",
    ),
    over_http(
        "tokens whose text has no special ones",
        RENDERER,
        replaced(".decode(*args, **kwargs)", ".decode(*args, skip_special_tokens=True, **kwargs)"),
        "server.tokens",
    ),
    over_http(
        "a completion that always gets its special tokens",
        COMPLETION,
        replaced("add_special_tokens=self.add_special_tokens", "add_special_tokens=True"),
        "server.tokens",
    ),
    over_http(
        "one log-probability more than allowed",
        PARAMS,
        replaced("if num_logprobs > max_logprobs:", "if num_logprobs > max_logprobs + 1:"),
        "server.limits",
    ),
    over_http(
        "a context that is longer by one",
        LENGTHS,
        replaced("if len(tokens) > max_input_tokens:", "if len(tokens) > max_input_tokens + 1:"),
        "server.limits",
    ),
    over_http(
        "a prompt that is cut on the other side",
        LENGTHS,
        replaced('if side == "left":', 'if side != "left":'),
        "server.limits",
    ),
    over_http(
        "a least length that must be below the greatest",
        PARAMS,
        replaced("self.min_tokens > self.max_tokens", "self.min_tokens >= self.max_tokens"),
        "server.limits",
    ),
    over_http(
        "a pattern that is shorter than its least size",
        STOPS,
        replaced("min_pattern_size = params.min_pattern_size", "min_pattern_size = 1"),
        "server.limits",
    ),
    over_http(
        "an old name that goes before the new one",
        CHATS,
        replaced("if request.max_completion_tokens is not None", "if request.max_tokens is None"),
        "server.limits",
    ),
)
DEFECTS = (
    *HTTP_DEFECTS,
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
