"""Defects of layers and of forms of models, each with the check that names the layer.

The operators of tests/proof/smoke/defects.py compute rightly with each of them.
"""

from tests.proof.smoke.defects import LLAMA, MIXTRAL, QWEN3, Defect, replaced

_LAYERS = "vllm/model_executor/layers"
NORM, LINEAR = f"{_LAYERS}/layernorm.py", f"{_LAYERS}/linear.py"
ACTIVATION, ATTENTION = f"{_LAYERS}/activation.py", f"{_LAYERS}/attention/attention.py"
ROPE, YARN = f"{_LAYERS}/rotary_embedding/__init__.py", f"{_LAYERS}/rotary_embedding/yarn_scaling"
LLAMA3, SCORES = f"{_LAYERS}/rotary_embedding/llama3_rope.py", f"{_LAYERS}/logits_processor.py"
EMBEDDING, GPT_OSS = (
    f"{_LAYERS}/vocab_parallel_embedding.py",
    "vllm/model_executor/models/gpt_oss.py",
)
CPU_ATTENTION = "vllm/v1/attention/backends/cpu_attn.py"
SCALE = "self.scaling = self.head_dim**-0.5"

DEFECTS = (
    Defect(
        "a norm with another epsilon",
        NORM,
        replaced("self.variance_epsilon = eps\n", "self.variance_epsilon = 1e-6\n"),
        "layers.norm",
    ),
    Defect(
        "a norm layer without its weight",
        NORM,
        replaced("self.weight.data if self.pass_weight else None", "None"),
        "layers.norm",
    ),
    Defect(
        "a norm layer that adds 0.1 % too much of the residual",
        NORM,
        replaced(
            "x,\n                residual,\n                self.weight",
            "x,\n                residual * 1.001,\n                self.weight",
        ),
        "layers.norm",
    ),
    Defect(
        "biases of queries, keys and values that nobody adds",
        LINEAR,
        replaced(
            "return self._gemm_impl(layer, x, layer.weight, bias)",
            "bias = None if bias is not None and len(bias) == 512 else bias\n"
            "        return self._gemm_impl(layer, x, layer.weight, bias)",
        ),
        "layers.linear",
    ),
    Defect(
        "a bias of attention's output that nobody adds",
        LINEAR,
        replaced(
            "bias_ = None if (self.tp_rank > 0 or self.skip_bias_add) else self.bias",
            "bias_ = None",
        ),
        "layers.linear",
    ),
    Defect(
        "keys and values in each other's place",
        LLAMA,
        replaced(
            '(".qkv_proj", "k"),\n            ".v_proj": (".qkv_proj", "v")',
            '(".qkv_proj", "v"),\n            ".v_proj": (".qkv_proj", "k")',
        ),
        "layers.linear",
    ),
    Defect(
        "the usual rotary base for every model",
        ROPE,
        replaced('base = rope_parameters.get("rope_theta", 10000)', "base = 10000"),
        "layers.rotary",
    ),
    Defect(
        "rope of llama3 without its smooth part",
        LLAMA3,
        replaced(
            "(1 - smooth) * inv_freqs / self.scaling_factor + smooth * inv_freqs",
            "inv_freqs / self.scaling_factor",
        ),
        "layers.rotary",
    ),
    Defect(
        "yarn without its factor of attention",
        f"{YARN}_rope.py",
        replaced("freqs.cos() * self.mscale", "freqs.cos()"),
        "layers.rotary",
    ),
    Defect(
        "yarn from a context twice as long",
        f"{YARN}_rope.py",
        replaced(
            "self.max_position_embeddings,\n            self.truncate",
            "2 * self.max_position_embeddings,\n            self.truncate",
        ),
        "layers.rotary",
    ),
    Defect(
        "a window longer by one",
        CPU_ATTENTION,
        replaced(
            "            self.sliding_window = sliding_window\n",
            "            self.sliding_window = sliding_window + 1\n",
        ),
        "layers.attention",
    ),
    Defect(
        "a window that the layers forget",
        ATTENTION,
        replaced("sliding_window = cache_config.sliding_window", "sliding_window = None"),
        "layers.attention",
    ),
    Defect(
        "Qwen3's attention scale off by 0.1 %",
        QWEN3,
        replaced(SCALE, f"{SCALE} * 1.001"),
        "layers.attention",
    ),
    Defect(
        "another activation",
        ACTIVATION,
        replaced(
            "return F.silu(x[..., :d]) * x[..., d:]", "return F.gelu(x[..., :d]) * x[..., d:]"
        ),
        "layers.mlp",
    ),
    Defect(
        "gate and product in each other's place",
        ACTIVATION,
        replaced(
            "return F.silu(x[..., :d]) * x[..., d:]", "return F.silu(x[..., d:]) * x[..., :d]"
        ),
        "layers.mlp",
    ),
    Defect(
        "embeddings of another token",
        EMBEDDING,
        replaced("self, input_.long())", "self, input_.long() ^ 1)"),
        "layers.embedding",
    ),
    Defect(
        "scores of tokens that are 0.1 % too large",
        SCORES,
        replaced(
            "            if self.scale != 1.0:",
            "            logits = logits * 1.001\n            if self.scale != 1.0:",
        ),
        "layers.embedding",
    ),
    Defect(
        "embeddings that are not tied",
        QWEN3,
        replaced("self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)", "pass"),
        "layers.embedding",
    ),
    Defect(
        "weights of experts that do not add up to one",
        MIXTRAL,
        replaced("renormalize=True", "renormalize=False"),
        "layers.mlp",
        "full",
    ),
    Defect(
        "attention of gpt-oss without its sinks",
        GPT_OSS,
        replaced("            sinks=self.sinks,\n", ""),
        "layers.attention",
        "full",
    ),
    Defect(
        "gpt-oss's attention scale off by 1 %",
        GPT_OSS,
        replaced(SCALE, f"{SCALE} * 1.01"),
        "layers.attention",
        "full",
    ),
    Defect(
        "a window in the other layers of gpt-oss",
        GPT_OSS,
        replaced("self.layer_idx % 2 == 0", "self.layer_idx % 2 == 1"),
        "layers.attention",
        "full",
    ),
)
