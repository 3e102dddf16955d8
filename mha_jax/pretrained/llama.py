"""Llama (Touvron et al. 2023) in the layout of `LlamaForCausalLM`: a run of task "lm".

Linear layers are [outputs, inputs]. Theirs rotates feature i of a head with feature i + K/2, ours with its neighbour:
the features of queries and keys are reordered, which changes no product of the two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mha_jax.pretrained import oracle, sizes
from mha_jax.pretrained.directory import Tensors
from mha_jax.pretrained.layout import Entry, entry, into_heads, linear, norm, out_of_heads
from mha_jax.pretrained.sizes import Sizes
from mha_jax.specs import HeadShape, RunSpec, UserError

MODEL_TYPE = "llama"


def task_of(config: Mapping[str, Any]) -> str:
    """Every llama is read as a language model, one without a head too."""
    return "lm"


def sizes_in(config: Mapping[str, Any]) -> Sizes:
    width, count = sizes.number(config, "hidden_size"), sizes.number(config, "num_hidden_layers")

    def shape() -> HeadShape:
        own = config.get("head_dim")
        heads = sizes.number(config, "num_attention_heads")
        return HeadShape.resolve(width, heads, config.get("num_key_value_heads"), own, own)

    return Sizes(
        width,
        sizes.number(config, "intermediate_size"),
        sizes.number(config, "vocab_size"),
        sizes.number(config, "max_position_embeddings"),
        sizes.layers(config, count, shape),
    )


def _rope_base(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: rotary positions of type {kind!r} cannot be built; 'default' can")
    # The first Llamas do not say it: theirs was a constant of the code.
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelSpec`. Raises: UserError for what our decoder cannot do."""
    sizes.refuse(config, {"hidden_act": ("silu", "swish"), "sliding_window": (None,), "qk_norm": (False,)})
    return sizes.model_fields(sizes_in(config)) | {
        "positions": "rope",
        "rope_base": _rope_base(config),
        "norm": "pre",
        "normalization": "rms",
        "norm_epsilon": sizes.said(config, "rms_norm_eps"),
        "activation": "swiglu",
        "use_bias": config.get("attention_bias", False),
        "use_ff_bias": config.get("mlp_bias", False),
        "scale_embedding": False,
        "embedding_norm": False,
        "token_types": 0,
        "tied_output": _tied(config),
        "pooling": "mean",
        "dropout_rate": 0.0,
        "attention_dropout_rate": config.get("attention_dropout", 0.0),
    }


def _headless(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["LlamaModel"]


def _tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", False)) or _headless(config)


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of such a checkpoint, tied ones once."""
    model, inner_bias = sizes_in(config), bool(config.get("mlp_bias", False))
    width, bias = model.d_model, bool(config.get("attention_bias", False))
    found = [
        entry("model.embed_tokens.weight", ("tokens", "embedding"), model.vocab_size, width),
        *norm("model.norm", ("decoder", "final_norm"), width, bias=False),
    ]
    if not _tied(config):
        found.append(entry("lm_head.weight", ("tokens", "output"), model.vocab_size, width))
    for layer, heads in enumerate(model.heads):
        name, path = f"model.layers.{layer}", ("decoder", "blocks", layer)
        attention, inner = (*path, "attention"), (*path, "feed_forward")
        names = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        found += norm(f"{name}.input_layernorm", (*path, "attention_norm"), width, bias=False)
        found += into_heads(names, attention, width, heads, bias=bias, transposed=True, halves=True)
        found += out_of_heads(f"{name}.self_attn.o_proj", attention, width, heads, bias=bias, transposed=True)
        found += norm(f"{name}.post_attention_layernorm", (*path, "feed_forward_norm"), width, bias=False)
        found += linear(f"{name}.mlp.gate_proj", (*inner, "gating"), width, model.d_ff, bias=inner_bias)
        found += linear(f"{name}.mlp.up_proj", (*inner, "up"), width, model.d_ff, bias=inner_bias)
        found += linear(f"{name}.mlp.down_proj", (*inner, "down"), model.d_ff, width, bias=inner_bias)
    return found


def prepared(config: Mapping[str, Any], tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors by the names of `LlamaForCausalLM`, without buffers, tied ones once.

    Returns: them, and what is to be told of a model without an output table.
    Raises:  UserError for tied tables that differ.
    """
    prefix = "model." if _headless(config) else ""
    found = {prefix + name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if _tied(config):
        sizes.untie(found, "model.embed_tokens.weight", "lm_head.weight")
    told = "a LlamaModel has no output table: logits and losses are by that of its inputs"
    return found, [told] if _headless(config) else []


def config_of(run: RunSpec, model: Sizes) -> dict[str, Any]:
    """The config.json of a run's model, as far as a llama can say it."""
    first = next((shape for shape in model.heads if shape.num_heads), model.heads[0])
    plain = HeadShape(first.num_heads, first.num_kv_heads, first.qk_dim, first.qk_dim)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": len(model.heads),
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.qk_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_length,
        "hidden_act": "silu",
        "rms_norm_eps": run.model.norm_epsilon,
        "rope_theta": run.model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": run.model.rope_base},
        "attention_bias": run.model.use_bias,
        "mlp_bias": run.model.use_ff_bias,
        "attention_dropout": run.model.attention_dropout_rate,
        "tie_word_embeddings": run.model.tied_output,
        **sizes.head_map(model, plain),
    }


def hidden_states(config: Mapping[str, Any], tensors: Tensors, tokens_T: np.ndarray) -> list[np.ndarray]:
    """The forward pass of one row in float64 by the prepared tensors, written apart from our model's.

    Returns: what enters the first layer, what each layer hands on [T, D], and the logits [T, C].
    """
    base, epsilon = _rope_base(config), config["rms_norm_eps"]
    return forward(tensors, sizes_in(config).heads, tokens_T, base=base, epsilon=epsilon, halves=True)


def forward(
    tensors: Tensors,
    shapes: Sequence[HeadShape],
    tokens_T: np.ndarray,
    *,
    base: float,
    epsilon: float,
    halves: bool,
) -> list[np.ndarray]:
    """`hidden_states` of tensors by name; with `halves` feature i is rotated with i + K/2, else 2i with 2i + 1."""
    w = {name.removeprefix("model."): tensor.astype(np.float64) for name, tensor in tensors.items()}
    length = len(tokens_T)

    def product(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * w[f"{name}.weight"]

    def turned(x: np.ndarray, width: int) -> np.ndarray:
        x = x.reshape(length, -1, width)
        angles = np.arange(length)[:, None] * base ** (-np.arange(0, width, 2) / width)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        half = width // 2
        first, second = (x[..., :half], x[..., half:]) if halves else (x[..., 0::2], x[..., 1::2])
        y = np.stack([first * cos - second * sin, second * cos + first * sin], axis=2 if halves else 3)
        return y.reshape(length, -1)

    x = w["embed_tokens.weight"][tokens_T]
    states = [x]
    for layer, heads in enumerate(shapes):
        name = f"layers.{layer}"
        q, k, v = (product(normed(x, f"{name}.input_layernorm"), f"{name}.self_attn.{part}_proj") for part in "qkv")
        q, k = turned(q, heads.qk_dim), turned(k, heads.qk_dim)
        x = x + product(oracle.attended(q, k, v, heads, np.tri(length, dtype=bool)), f"{name}.self_attn.o_proj")
        y = normed(x, f"{name}.post_attention_layernorm")
        gate = product(y, f"{name}.mlp.gate_proj")
        x = x + product(gate / (1 + np.exp(-gate)) * product(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        states.append(x)
    return [*states, normed(x, "norm") @ w.get("lm_head.weight", w["embed_tokens.weight"]).T]
