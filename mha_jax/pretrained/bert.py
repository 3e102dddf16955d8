"""BERT (Devlin et al. 2019) in the layout of `BertForMaskedLM` and `BertForSequenceClassification`.

A masked language model becomes a run of task "masked_lm", a classifier one of task "classification" with pooling
"first". Linear layers are [outputs, inputs]. Of a checkpoint made by pretraining, the pooler and the next-sentence
layer are left out of a masked language model: nothing of it reads them.

An encoder without a head that we have, such as a sentence encoder, becomes a masked language model too, as its heads
can be looked into: what a head needs beside the token table is put there so that it does least, the dense layer as the
identity, biases 0.
"""

from collections.abc import Mapping, Sequence
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
_HEADLESS = (
    "BertModel",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForNextSentencePrediction",
    "BertForMultipleChoice",
)
_UNREAD = {"masked_lm": ("bert.pooler.", "cls.seq_relationship."), "classification": ()}


def _architecture(config: Mapping[str, Any]) -> str:
    named = (config.get("architectures") or ["none"])[0]
    if named not in _TASKS and named not in _HEADLESS:
        known = ", ".join([*_TASKS, *_HEADLESS])
        raise UserError(f"config.json: architectures={named!r} cannot be imported; {known} can")
    return named


def task_of(config: Mapping[str, Any]) -> str:
    """The task of the run. Raises: UserError for an architecture that we do not know."""
    return _TASKS.get(_architecture(config), "masked_lm")


def sizes_in(config: Mapping[str, Any]) -> Sizes:
    width, count = sizes.number(config, "hidden_size"), sizes.number(config, "num_hidden_layers")
    return Sizes(
        width,
        sizes.number(config, "intermediate_size"),
        sizes.number(config, "vocab_size"),
        sizes.number(config, "max_position_embeddings"),
        sizes.layers(config, count, lambda: HeadShape.resolve(width, sizes.number(config, "num_attention_heads"))),
    )


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's classes, in their order."""
    named = config.get("id2label")
    if named is None:
        return tuple(f"LABEL_{number}" for number in range(config.get("num_labels", 2)))
    return tuple(named[number] for number in sorted(named, key=int))


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """What config.json says of the names of a classifier's classes."""
    numbered = {str(number): name for number, name in enumerate(names)}
    return {"id2label": numbered, "label2id": {name: int(number) for number, name in numbered.items()}}


def relabelled(tensors: Tensors, order: Sequence[int]) -> Tensors:
    """The tensors of a classifier whose class i is the `order[i]`-th of these."""
    own = {name: tensors[name][list(order)] for name in ("classifier.weight", "classifier.bias")}
    return {**tensors, **own}


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelSpec`. Raises: UserError for what our encoder cannot do."""
    wanted = {"position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,)}
    sizes.refuse(config, wanted | {"classifier_dropout": (None,)})
    if _architecture(config) in _TASKS and task_of(config) == "masked_lm":
        sizes.refuse(config, {"tie_word_embeddings": (True,)})
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
        "tied_output": True,
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
        return found + linear("classifier", ("classes",), width, len(labels(config)))
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


def prepared(config: Mapping[str, Any], tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors by the names of today, without buffers, and tied ones once; with a head where there is none.

    Returns: them, and what is to be told of a head that was put there.
    Raises:  UserError for an output table of its own.
    """
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name
        if not name.endswith(".position_ids") and not name.startswith(_UNREAD[task_of(config)]):
            found[name] = tensor
    if (named := _architecture(config)) in _HEADLESS:
        unread = sorted(name for name in found if not name.startswith("bert."))
        kept = {name: tensor for name, tensor in found.items() if name not in unread}
        told = f"a {named} has no head of a masked language model: logits and losses are of one that was put there"
        return kept | _least_head(config), [told + (f"; left out: {', '.join(unread)}" if unread else "")]
    sizes.untie(found, "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    if task_of(config) == "masked_lm":
        bias = found.get("cls.predictions.decoder.bias")
        if bias is not None:
            found.setdefault("cls.predictions.bias", bias)
        sizes.untie(found, "cls.predictions.bias", "cls.predictions.decoder.bias")
    return found, []


def _least_head(config: Mapping[str, Any]) -> Tensors:
    width, inside = sizes.number(config, "hidden_size"), "cls.predictions.transform"
    return {
        f"{inside}.dense.weight": np.eye(width, dtype=np.float32),
        f"{inside}.dense.bias": np.zeros(width, np.float32),
        f"{inside}.LayerNorm.weight": np.ones(width, np.float32),
        f"{inside}.LayerNorm.bias": np.zeros(width, np.float32),
        "cls.predictions.bias": np.zeros(sizes.number(config, "vocab_size"), np.float32),
    }


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
        **(label_fields([f"LABEL_{number}" for number in range(classes)]) if classes else {}),
        **sizes.head_map(model, shape),
    }


def hidden_states(config: Mapping[str, Any], tensors: Tensors, tokens_T: np.ndarray) -> list[np.ndarray]:
    """The forward pass of one row in float64 by the prepared tensors, written apart from our model's.

    Returns: what enters the first layer, what each layer hands on [T, D], and the logits: [T, C], or of classes [C].
    """
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
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
