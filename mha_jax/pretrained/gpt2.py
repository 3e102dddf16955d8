"""GPT-2 (Radford et al. 2019) in the layout of `GPT2LMHeadModel`: a run of task "lm".

Its linear layers are "Conv1D": [inputs, outputs], not transposed; c_attn holds queries, keys and values side by side.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mha_jax.pretrained import oracle, sizes
from mha_jax.pretrained.directory import Tensors
from mha_jax.pretrained.layout import Entry, entry, into_heads, linear, norm, out_of_heads
from mha_jax.pretrained.sizes import Sizes
from mha_jax.specs import HeadShape, RunSpec

MODEL_TYPE = "gpt2"


def task_of(config: Mapping[str, Any]) -> str:
    """A GPT-2 of any head has the language model's, which is its table."""
    return "lm"


def sizes_in(config: Mapping[str, Any]) -> Sizes:
    width, count = sizes.number(config, "n_embd"), sizes.number(config, "n_layer")
    return Sizes(
        width,
        config.get("n_inner") or 4 * width,  # null in config.json says so
        sizes.number(config, "vocab_size"),
        sizes.number(config, "n_positions"),
        sizes.layers(config, count, lambda: HeadShape.resolve(width, sizes.number(config, "n_head"))),
    )


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelSpec`. Raises: UserError for what our decoder cannot do."""
    wanted = {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}
    sizes.refuse(config, wanted | {"add_cross_attention": (False,)})
    sizes.refuse(config, {"embd_pdrop": (sizes.said(config, "resid_pdrop"),)})
    return sizes.model_fields(sizes_in(config)) | {
        "positions": "learned",
        "norm": "pre",
        "normalization": "layer",
        "norm_epsilon": sizes.said(config, "layer_norm_epsilon"),
        "activation": sizes.activation(config, "activation_function"),
        "use_bias": True,
        "use_ff_bias": True,
        "scale_embedding": False,
        "embedding_norm": False,
        "token_types": 0,
        "tied_output": _tied(config),
        "pooling": "mean",
        "dropout_rate": sizes.said(config, "resid_pdrop"),
        "attention_dropout_rate": sizes.said(config, "attn_pdrop"),
    }


def _tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", True))


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of such a checkpoint, tied ones once."""
    model = sizes_in(config)
    width = model.d_model
    untied = [] if _tied(config) else [entry("lm_head.weight", ("tokens", "output"), model.vocab_size, width)]
    found = [
        entry("transformer.wte.weight", ("tokens", "embedding"), model.vocab_size, width),
        entry("transformer.wpe.weight", ("decoder", "positions", "embedding"), model.max_length, width),
        *norm("transformer.ln_f", ("decoder", "final_norm"), width),
        *untied,
    ]
    for layer, heads in enumerate(model.heads):
        name, path = f"transformer.h.{layer}", ("decoder", "blocks", layer)
        attention, inner = (*path, "attention"), (*path, "feed_forward")
        found += norm(f"{name}.ln_1", (*path, "attention_norm"), width)
        found += into_heads([f"{name}.attn.c_attn"], attention, width, heads, bias=True, transposed=False)
        found += out_of_heads(f"{name}.attn.c_proj", attention, width, heads, bias=True, transposed=False)
        found += norm(f"{name}.ln_2", (*path, "feed_forward_norm"), width)
        found += linear(f"{name}.mlp.c_fc", (*inner, "up"), width, model.d_ff, transposed=False)
        found += linear(f"{name}.mlp.c_proj", (*inner, "down"), model.d_ff, width, transposed=False)
    return found


def prepared(config: Mapping[str, Any], tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors with the prefix that the first checkpoints lack, without the buffers of masks, tied ones once.

    Returns: them, and what is to be told: nothing. Raises: UserError for tied tables that differ.
    """
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            found[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = tensor
    if _tied(config):
        sizes.untie(found, "transformer.wte.weight", "lm_head.weight")
    return found, []


def config_of(run: RunSpec, model: Sizes) -> dict[str, Any]:
    """The config.json of a run's model, as far as a GPT-2 can say it."""
    whole = max((shape.num_heads for shape in model.heads), default=1)
    shape = HeadShape(whole, whole, model.d_model // max(whole, 1), model.d_model // max(whole, 1))
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": MODEL_TYPE,
        "n_embd": model.d_model,
        "n_inner": model.d_ff,
        "n_layer": len(model.heads),
        "n_head": whole,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_length,
        "activation_function": sizes.activation_name(run.model.activation),
        "layer_norm_epsilon": run.model.norm_epsilon,
        "resid_pdrop": run.model.dropout_rate,
        "embd_pdrop": run.model.dropout_rate,
        "attn_pdrop": run.model.attention_dropout_rate,
        "tie_word_embeddings": run.model.tied_output,
        **sizes.head_map(model, shape),
    }


def hidden_states(config: Mapping[str, Any], tensors: Tensors, tokens_T: np.ndarray) -> list[np.ndarray]:
    """The forward pass of one row in float64 by the prepared tensors, written apart from our model's.

    Returns: what enters the first layer, what each layer hands on [T, D], and the logits [T, C].
    """
    w = {name.removeprefix("transformer."): x.astype(np.float64) for name, x in tensors.items()}
    act = oracle.ACTIVATIONS[sizes.activation(config, "activation_function")]

    def product(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config["layer_norm_epsilon"])
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    length = len(tokens_T)
    x = w["wte.weight"][tokens_T] + w["wpe.weight"][:length]
    states = [x]
    for layer, heads in enumerate(sizes_in(config).heads):
        name = f"h.{layer}"
        packed = product(normed(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        ends = np.cumsum([heads.num_heads * heads.qk_dim, heads.num_kv_heads * heads.qk_dim])
        y = oracle.attended(*np.split(packed, ends, axis=-1), heads, np.tri(length, dtype=bool))
        x = x + product(y, f"{name}.attn.c_proj")
        x = x + product(act(product(normed(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
        states.append(x)
    return [*states, normed(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T]
