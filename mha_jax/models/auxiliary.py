"""What training adds to the loss of the task, and what it tells beside it: balance of routers, spans of heads."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from mha_jax.attention.multihead import MultiHeadAttention
from mha_jax.attention.routing import Route
from mha_jax.models.losses import Batch
from mha_jax.specs import RunSpec

Total = Callable[[Any], Any]


def auxiliary_losses(run: RunSpec, model: Any, batch: Batch, routes: Sequence[Route], total: Total) -> dict[str, Array]:
    """This shard's part of every loss beside the task's, weighted as it goes into the objective; parts add up.

      balance_loss  balance_weight * mean over attentions of E * sum over i of f[i] P[i]  (Fedus et al. 2022, eq. 4)
                    f[i] the share of tokens that use head i (with "moa" over top_k), P[i] its mean probability
      router_loss   z_weight * mean over attentions and tokens of (log sum over i of exp(score[i])) ** 2
      span_loss     adaptive_span.weight * sum over layers of the mean span over heads, in tokens

    Means are over the real tokens of the whole batch: `total` adds up over shards. E are the heads that are routed.
    """
    losses = {}
    if run.model.routing.kind != "none":
        losses |= _routing_losses(run, _by_attention(run, model, batch, routes), total)
    if run.model.adaptive_span.max_span is not None:
        spans = [layer.span.lengths().mean() for layer in _attentions(model).values() if layer.span is not None]
        losses["span_loss"] = run.model.adaptive_span.weight * jnp.sum(jnp.stack(spans)) / total(jnp.ones(()))
    return losses


def _routing_losses(run: RunSpec, found: dict[str, tuple[Route, Array]], total: Total) -> dict[str, Array]:
    spec, balance, squares = run.model.routing, [], []
    for route, real_BT in found.values():
        real_BT1 = real_BT[..., None]
        tokens = jnp.maximum(total(real_BT.sum()), 1)
        used_E = total((route.chosen_BTE & real_BT1).sum(axis=(0, 1))) / tokens
        probability_E = jnp.where(real_BT1, jax.nn.softmax(route.scores_BTE), 0).sum(axis=(0, 1)) / tokens
        balance.append(len(used_E) * jnp.sum(used_E * probability_E))
        normalizer_BT = jax.nn.logsumexp(route.scores_BTE, axis=-1)
        squares.append(jnp.where(real_BT, normalizer_BT**2, 0).sum() / tokens)
    weight = spec.balance_weight / (spec.top_k if spec.kind == "moa" else 1)
    losses = {"balance_loss": weight * jnp.mean(jnp.stack(balance))}
    return losses | ({"router_loss": spec.z_weight * jnp.mean(jnp.stack(squares))} if spec.z_weight else {})


def observations(run: RunSpec, model: Any, batch: Batch, routes: Sequence[Route]) -> dict[str, Array]:
    """Means over the real tokens of a batch, by attention; empty where nothing is routed and no span is learned.

    "active_heads/NAME": heads with a factor above 0. "busiest_head/NAME": the share of tokens that use the routed head
    that most use; top_k / E is perfect balance. "span/NAME": the mean over heads of the learned span, in tokens.
    """
    seen = {}
    if run.model.routing.kind != "none":
        for name, (route, real_BT) in _by_attention(run, model, batch, routes).items():
            real_BT1, tokens = real_BT[..., None], jnp.maximum(real_BT.sum(), 1)
            seen[f"active_heads/{name}"] = ((route.gate_BTH > 0) & real_BT1).sum() / tokens
            seen[f"busiest_head/{name}"] = (route.chosen_BTE & real_BT1).sum(axis=(0, 1)).max() / tokens
    for name, layer in _attentions(model).items():
        if layer.span is not None:
            seen[f"span/{name}"] = layer.span.lengths().mean()
    return seen


def _attentions(model: Any) -> dict[str, MultiHeadAttention]:
    """Every attention in the order of the forward pass: "decoder/0/attention", "decoder/0/cross_attention", ..."""
    return {
        f"{kind}/{layer}/{place}": getattr(block, place)
        for kind in ("encoder", "decoder")
        if hasattr(model, kind)
        for layer, block in enumerate(getattr(model, kind).blocks)
        for place in ("attention", "cross_attention")
        if hasattr(block, place)
    }


def _by_attention(
    run: RunSpec, model: Any, batch: Batch, routes: Sequence[Route]
) -> dict[str, tuple[Route, Bool[Array, "B T"]]]:
    """The route of each attention, with which of its queries are no padding."""
    real = _real_queries(run.task, batch)
    return {name: (route, real[name.split("/")[0]]) for name, route in zip(_attentions(model), routes, strict=True)}


def _real_queries(task: str, batch: Batch) -> dict[str, Bool[Array, "B T"]]:
    if task == "lm":
        return {"decoder": batch["weights"] > 0}
    tokens, lengths = ("source", "source_lengths") if task == "translation" else ("inputs", "lengths")
    encoder_BT = jnp.arange(batch[tokens].shape[1])[None, :] < batch[lengths][:, None]
    if task == "classification":
        return {"encoder": encoder_BT & (batch["weights"] > 0)[:, None]}
    decoder_BT = batch["weights"] > 0
    return {"encoder": encoder_BT & decoder_BT.any(axis=1, keepdims=True), "decoder": decoder_BT}
