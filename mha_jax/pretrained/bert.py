"""BERT (Devlin et al. 2019) in the layout of `BertForMaskedLM` and `BertForSequenceClassification`.

A masked language model becomes a run of task "masked_lm", a classifier one of task "classification" with pooling
"first". Linear layers are [outputs, inputs]. Of a checkpoint made by pretraining, the pooler and the next-sentence
layer are left out of a masked language model: nothing of it reads them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mha_jax.pretrained import oracle, sizes
from mha_jax.pretrained.directory import Tensors
from mha_jax.pretrained.layout import Entry, entry, into_heads, linear, norm, out_of_heads
from mha_jax.pretrained.sizes import Sizes
from mha_jax.specs import HeadShape, ModelSpec, RunSpec, UserError

MODEL_TYPE = "bert"
_TASKS = {
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "masked_lm",
    "BertForSequenceClassification": "classification",
}
_UNREAD = {"masked_lm": ("bert.pooler.", "cls.seq_relationship."), "classification": ()}


def task_of(config: Mapping[str, Any]) -> str:
    """The task of the run. Raises: UserError for an architecture without a head that we can run."""
    named = config.get("architectures") or ["none"]
    if named[0] not in _TASKS:
        raise UserError(f"config.json: architectures={named!r} has no head to run; {', '.join(_TASKS)} can be imported")
    return _TASKS[named[0]]


def sizes_in(config: Mapping[str, Any]) -> Sizes:
    width, count = sizes.number(config, "hidden_size"), sizes.number(config, "num_hidden_layers")
    return Sizes(
        width,
        sizes.number(config, "intermediate_size"),
        sizes.number(config, "vocab_size"),
        sizes.number(config, "max_position_embeddings"),
        sizes.layers(config, count, lambda: HeadShape.resolve(width, sizes.number(config, "num_attention_heads"))),
    )


def num_classes(config: Mapping[str, Any]) -> int:
    """Labels of a classifier; their names are in id2label."""
    return len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 2))


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelSpec`. Raises: UserError for what our encoder cannot do."""
    wanted = {"position_embedding_type": ("absolute",), "is_decoder": (False,), "tie_word_embeddings": (True,)}
    sizes.refuse(config, wanted | {"add_cross_attention": (False,), "classifier_dropout": (None,)})
    return sizes.model_fields(sizes_in(config)) | {
        "positions": "learned",
        "norm": "post",
        "normalization": "layer",
        "norm_epsilon": sizes.said(config, "layer_norm_eps"),
        "activation": sizes.activation(config, "hidden_act"),
        "use_bias": True,
        "use_ff_bias": True,
        "scale_embedding": False,
        "embedding_norm": True,
        "token_types": sizes.number(config, "type_vocab_size"),
        "pooling": "first" if task_of(config) == "classification" else "mean",
        "dropout_rate": sizes.said(config, "hidden_dropout_prob"),
        "attention_dropout_rate": sizes.said(config, "attention_probs_dropout_prob"),
    }


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of such a checkpoint, tied ones once."""
    model, width = sizes_in(config), sizes.number(config, "hidden_size")
    inside, tokens = "bert.embeddings", ("tokens",)
    found = [
        entry(f"{inside}.word_embeddings.weight", (*tokens, "embedding"), model.vocab_size, width),
        entry(
            f"{inside}.token_type_embeddings.weight",
            (*tokens, "type_embedding"),
            sizes.number(config, "type_vocab_size"),
            width,
        ),
        entry(f"{inside}.position_embeddings.weight", ("encoder", "positions", "embedding"), model.max_length, width),
        *norm(f"{inside}.LayerNorm", ("encoder", "embedding_norm"), width),
    ]
    for layer, heads in enumerate(model.heads):
        found += _block(f"bert.encoder.layer.{layer}", ("encoder", "blocks", layer), model, heads)
    if task_of(config) == "classification":
        found += linear("bert.pooler.dense", ("pooler",), width, width)
        return found + linear("classifier", ("classes",), width, num_classes(config))
    found += linear("cls.predictions.transform.dense", ("head", "dense"), width, width)
    found += norm("cls.predictions.transform.LayerNorm", ("head", "norm"), width)
    return [*found, entry("cls.predictions.bias", ("head", "bias"), model.vocab_size)]


def _block(name: str, path: tuple[str | int, ...], model: Sizes, heads: HeadShape) -> list[Entry]:
    width, attention = model.d_model, (*path, "attention")
    names = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
    return [
        *into_heads(names, attention, width, heads, bias=True, transposed=True),
        *out_of_heads(f"{name}.attention.output.dense", attention, width, heads, bias=True, transposed=True),
        *norm(f"{name}.attention.output.LayerNorm", (*path, "attention_norm"), width),
        *linear(f"{name}.intermediate.dense", (*path, "feed_forward", "up"), width, model.d_ff),
        *linear(f"{name}.output.dense", (*path, "feed_forward", "down"), model.d_ff, width),
        *norm(f"{name}.output.LayerNorm", (*path, "feed_forward_norm"), width),
    ]


def prepared(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors by the names of today, without buffers, and tied ones once.

    Raises: UserError for an output table of its own.
    """
    found = {}
    for name, tensor in tensors.items():
        name = name.replace(".LayerNorm.gamma", ".LayerNorm.weight").replace(".LayerNorm.beta", ".LayerNorm.bias")
        if not name.endswith(".position_ids") and not name.startswith(_UNREAD[task_of(config)]):
            found[name] = tensor
    sizes.untie(found, "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    if task_of(config) == "masked_lm":
        bias = found.get("cls.predictions.decoder.bias")
        if bias is not None:
            found.setdefault("cls.predictions.bias", bias)
        sizes.untie(found, "cls.predictions.bias", "cls.predictions.decoder.bias")
    return found


def config_of(run: RunSpec, model: Sizes) -> dict[str, Any]:
    """The config.json of a run's model, as far as a BERT can say it."""
    spec: ModelSpec = run.model
    whole = max((shape.num_heads for shape in model.heads), default=1)
    shape = HeadShape(whole, whole, model.d_model // max(whole, 1), model.d_model // max(whole, 1))
    classes = run.data.num_classes if run.task == "classification" else None
    return {
        "architectures": ["BertForSequenceClassification" if classes else "BertForMaskedLM"],
        "model_type": MODEL_TYPE,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": len(model.heads),
        "num_attention_heads": whole,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": spec.token_types,
        "hidden_act": sizes.activation_name(spec.activation),
        "layer_norm_eps": spec.norm_epsilon,
        "hidden_dropout_prob": spec.dropout_rate,
        "attention_probs_dropout_prob": spec.attention_dropout_rate,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        **({"id2label": {str(n): f"LABEL_{n}" for n in range(classes)}} if classes else {}),
        **({"label2id": {f"LABEL_{n}": n for n in range(classes)}} if classes else {}),
        **sizes.head_map(model, shape),
    }


def hidden_states(config: Mapping[str, Any], tensors: Tensors, tokens_T: np.ndarray) -> list[np.ndarray]:
    """The forward pass of one row in float64 by the original tensors, written apart from our model's.

    Returns: what enters the first layer, what each layer hands on [T, D], and the logits: [T, C], or of classes [C].
    """
    w = {name: tensor.astype(np.float64) for name, tensor in prepared(config, tensors).items()}
    act, epsilon = oracle.ACTIVATIONS[sizes.activation(config, "hidden_act")], config["layer_norm_eps"]

    def product(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    inside = "bert.embeddings"
    x = w[f"{inside}.word_embeddings.weight"][tokens_T] + w[f"{inside}.token_type_embeddings.weight"][0]
    x = normed(x + w[f"{inside}.position_embeddings.weight"][: len(tokens_T)], f"{inside}.LayerNorm")
    states = [x]
    everything = np.ones((len(tokens_T), len(tokens_T)), bool)
    for layer, heads in enumerate(sizes_in(config).heads):
        name = f"bert.encoder.layer.{layer}"
        q, k, v = (product(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        y = oracle.attended(q, k, v, heads, everything)
        x = normed(x + product(y, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        y = act(product(x, f"{name}.intermediate.dense"))
        x = normed(x + product(y, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        states.append(x)
    if task_of(config) == "classification":
        return [*states, product(np.tanh(product(x[0], "bert.pooler.dense")), "classifier")]
    y = normed(act(product(x, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
    return [*states, y @ w[f"{inside}.word_embeddings.weight"].T + w["cls.predictions.bias"]]
