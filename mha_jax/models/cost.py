"""What a model costs, counted from the spec alone: parameters, FLOPs and cache bytes, all exact integers.

Conventions: a multiply-add is 2 FLOPs; only matrix products count (no norm, softmax, embedding look-up); attention
scores and averages are counted over the whole square of data.length, causal or not; a source is as long as its target.
"""

import dataclasses
from collections.abc import Callable

from mha_jax.specs import ATTENTION_KINDS, HeadShape, ModelSpec, RoutingSpec, RunSpec, SpanSpec, UserError

_BASE_FIELDS = ("num_heads", "num_kv_heads", "qk_dim", "v_dim", "head_to_group")
_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


def _attention_parameters(model: ModelSpec, shape: HeadShape) -> int:
    queries = shape.num_heads * shape.qk_dim
    keys_values = shape.num_kv_heads * (shape.qk_dim + shape.v_dim)
    values = shape.num_heads * shape.v_dim
    biases = queries + keys_values + model.d_model if model.use_bias else 0
    spans = shape.num_heads if model.adaptive_span.max_span is not None else 0
    return model.d_model * (queries + keys_values + values + model.routing.columns(shape)) + biases + spans


def _attention_flops(model: ModelSpec, shape: HeadShape, length: int) -> int:
    queries = shape.num_heads * shape.qk_dim
    keys_values = shape.num_kv_heads * (shape.qk_dim + shape.v_dim)
    values = shape.num_heads * shape.v_dim
    projections = queries + keys_values + values + model.routing.columns(shape)
    return 2 * model.d_model * projections + 2 * length * (queries + values)


def _over_layers(run: RunSpec, model: ModelSpec, count: Callable[[HeadShape], int]) -> int:
    return sum(count(shape) for kind in ATTENTION_KINDS[run.task] for shape in model.heads(kind))


def _num_stacks(run: RunSpec) -> int:
    return 2 if run.task == "translation" else 1


def _all_attention(run: RunSpec, model: ModelSpec, what: str) -> int:
    if what == "params":
        return _over_layers(run, model, lambda shape: _attention_parameters(model, shape))
    return _over_layers(run, model, lambda shape: _attention_flops(model, shape, run.data.length))


def _feed_forward_unit(model: ModelSpec, what: str) -> int:
    """What one more unit of F costs in a block: a column of each product into F, a row of the one out of it."""
    into = 2 if model.activation == "swiglu" else 1
    if what == "flops":
        return 2 * (into + 1) * model.d_model
    return (into + 1) * model.d_model + (into if model.use_ff_bias else 0)


def matched_d_ff(run: RunSpec) -> int:
    """The feed-forward width at which the model costs what the base cell does, `model.match` saying in which coin.

      F = d_ff + round((attention(base) - attention(cell)) / (feed-forward blocks * cost of one unit of F))

    One unit of F costs 2D + 1 parameters (its bias included), or 4D FLOPs a token; with SwiGLU 3D + 2, or 6D. Halves
    round up.

    Returns: model.d_ff itself for match="none".
    Raises:  UserError where not even F = 1 is cheap enough, or match_base names something that is no head shape.
    """
    model = run.model
    if model.match == "none":
        return model.d_ff
    given = dict(model.match_base or {})
    unknown = [name for name in given if name not in _BASE_FIELDS]
    if unknown:
        raise UserError(f"model.match_base has {unknown[0]!r}; it may have {', '.join(_BASE_FIELDS)}")
    shape = dict.fromkeys(_BASE_FIELDS) | {"num_heads": model.num_heads} | given
    plain = {"match": "none", "match_base": None, "routing": RoutingSpec(), "adaptive_span": SpanSpec()}
    base = dataclasses.replace(model, **plain, **shape)
    missing = _all_attention(run, base, model.match) - _all_attention(run, model, model.match)
    unit = _feed_forward_unit(model, model.match)
    per_step = unit * model.num_layers * _num_stacks(run)
    width = model.d_ff + (2 * missing + per_step) // (2 * per_step)
    if width < 1:
        raise UserError(
            f"model.match={model.match!r} needs d_ff={width}: attention with num_heads={model.num_heads} alone costs "
            f"more than the base; a model.d_ff of at least {model.d_ff + 1 - width} fits"
        )
    return width


def parameters(run: RunSpec) -> int:
    """Trained numbers in the model: a tied table counts once though it is read twice; gates where they are trained."""
    model, d_model, stacks = run.model, run.model.d_model, _num_stacks(run)
    blocks = stacks * model.num_layers
    attentions = len(ATTENTION_KINDS[run.task]) * model.num_layers
    width = matched_d_ff(run)
    total = run.data.tokens * d_model * (1 if model.tied_output else 2)
    total += model.token_types * d_model
    total += stacks * model.max_length * d_model if model.positions == "learned" else 0
    total += _all_attention(run, model, "params")
    total += blocks * (width * _feed_forward_unit(model, "params") + (d_model if model.use_ff_bias else 0))
    norms = attentions + blocks + stacks * ((model.norm == "pre") + model.embedding_norm) + (run.task == "masked_lm")
    total += norms * d_model * (2 if model.normalization == "layer" else 1)
    total += run.gated_heads if run.gates.kind != "none" else 0
    if run.task == "masked_lm":
        total += (d_model + 1) * d_model + run.data.tokens
    if run.task == "classification":
        total += (d_model + 1) * (d_model if model.pooling == "first" else 0)
        total += (d_model + 1) * (run.data.num_classes or 0)
    return total


def flops_per_token(run: RunSpec) -> int:
    """FLOPs of the forward pass for one target token and, in translation, the one source token that goes with it.

    A masked language model is counted with the logits of all its positions, as they are computed.
    Left out: the last layers of a classifier, which act once a sequence.
    """
    model = run.model
    feed_forward = _num_stacks(run) * model.num_layers * _feed_forward_unit(model, "flops") * matched_d_ff(run)
    logits = 0 if run.task == "classification" else 2 * run.data.tokens * model.d_model
    logits += 2 * model.d_model**2 if run.task == "masked_lm" else 0
    return _all_attention(run, model, "flops") + feed_forward + logits


def training_flops_per_token(run: RunSpec) -> int:
    """FLOPs of forward and backward pass for one target token: 3 times the forward pass, and what is computed again.

    Each product has two gradients of its own size. `model.remat` computes forward once more: "block" the blocks,
    "attention" the attention layers, "dots" scores and averages.
    """
    model = run.model
    attention = _all_attention(run, model, "flops")
    averages = _over_layers(run, model, lambda s: 2 * run.data.length * s.num_heads * (s.qk_dim + s.v_dim))
    feed_forward = _num_stacks(run) * model.num_layers * _feed_forward_unit(model, "flops") * matched_d_ff(run)
    again = {"none": 0, "attention": attention, "dots": averages, "block": attention + feed_forward}[model.remat]
    return 3 * flops_per_token(run) + again


def active_flops_per_token(run: RunSpec) -> int:
    """`flops_per_token` if nothing were computed for the heads that a token does not use: no query, attention, output.

    Keys and values stay, as other tokens read them. It is what routing would save, not what it does: the model computes
    all heads and multiplies by the router's zeros.
    """
    model = run.model
    if model.routing.kind == "none":
        return flops_per_token(run)

    def idle(shape: HeadShape) -> int:
        each = 2 * (model.d_model + run.data.length) * (shape.qk_dim + shape.v_dim)
        return (shape.num_heads - model.routing.active) * each

    return flops_per_token(run) - _over_layers(run, model, idle)


def kv_cache_bytes_per_token(run: RunSpec) -> int:
    """Bytes of keys and values that decoding holds for one target token and, in translation, one source token.

    Returns: 0 for masked language models and classifiers, which do not decode.
    """
    kinds = [kind for kind in ATTENTION_KINDS[run.task] if kind != "encoder"]
    shapes = [shape for kind in kinds for shape in run.model.heads(kind)]
    return _BYTES[run.model.dtype] * sum(s.num_kv_heads * (s.qk_dim + s.v_dim) for s in shapes)
