"""What chosen heads compute for chosen examples, as named tensors."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mha_jax.attention.attend import broadcast_gate
from mha_jax.attention.dropout import attention_keep, keys_per_example
from mha_jax.attention.statistics import attention_weights
from mha_jax.heads.capture import Attended, Batch, attentions, check_numbers, chosen_layers, num_examples, watch
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

WHATS = ("logits", "weights", "weights_after_dropout", "head_output", "head_output_residual")


def capture(
    model: Model,
    batch: Batch,
    what: Sequence[str] = ("weights",),
    *,
    layers: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    examples: Sequence[int] | None = None,
    dropout_keys: Key[Array, "B"] | None = None,
) -> dict[str, dict[str, Array]]:
    """{attention: {what: tensor}} of chosen attentions, heads and examples (default: all), recomputed from q and k.

    logits                 [b, h, T, S]  <q, k> / sqrt(K), what the softmax is taken of; -inf where not visible
    weights                [b, h, T, S]  their softmax; a row of 0 where a query sees nothing
    weights_after_dropout  [b, h, T, S]  weights / (1 - rate) where they are kept, else 0
    head_output            [b, T, h, V]  what a head reads: the sum over s of its weights (after dropout) times values
    head_output_residual   [b, T, h, D]  what it adds to the residual stream: gate * head_output @ out.kernel[h]

    Float32 at least, in the order asked for. Summed over all heads, and with out.bias, the last is the output of the
    layer. There is dropout only where `dropout_keys`, one an example, are given: the same as in that call of the model.
    No other head or example takes memory of this kind.

    Raises: UserError for a name, attention, head or example that does not exist.
    """
    for name in what:
        if name not in WHATS:
            raise UserError(f"there is no tensor {name!r}; there are {', '.join(WHATS)}")
    for name in chosen_layers(model, layers):
        check_numbers(f"{name} has no head", heads, attentions(model)[name].shape.num_heads)
    check_numbers("the batch has no example", examples, num_examples(model, batch))

    def look(name: str, attended: Attended) -> dict[str, Array]:
        return _tensors(attended, what, heads, examples)

    return watch(model, batch, look, layers, dropout_keys)[1]


def _tensors(
    attended: Attended, what: Sequence[str], heads: Sequence[int] | None, examples: Sequence[int] | None
) -> dict[str, Array]:
    layer, q, k, v, visibility, dropout_keys = attended
    (batch, queries, num_heads, _), keys = q.shape, k.shape[1]
    h = np.arange(num_heads) if heads is None else np.asarray(heads, int)
    b = np.arange(batch) if examples is None else np.asarray(examples, int)
    groups = layer.shape.head_to_group

    def scores(logits: bool) -> Array:
        return attention_weights(q, k, visibility, None, groups, heads=heads, examples=examples, logits=logits)

    found = {"logits": scores(logits=True)} if "logits" in what else {}
    weights = found["weights"] = scores(logits=False)
    if dropout_keys is not None and layer.dropout_rate:
        own = keys_per_example(dropout_keys, batch)[b]
        keep = attention_keep(own, jnp.asarray(h), jnp.arange(queries), jnp.arange(keys), layer.dropout_rate)
        weights = jnp.where(keep, weights / (1 - layer.dropout_rate), 0)
    found["weights_after_dropout"] = weights
    values_bShV = v[b][:, :, np.asarray(layer.shape.groups, int)[h]].astype(weights.dtype)
    if not {"head_output", "head_output_residual"}.isdisjoint(what):
        found["head_output"] = jnp.einsum("bhts,bshv->bthv", weights, values_bShV)
    if "head_output_residual" in what:
        gate_BTH = broadcast_gate(layer.head_gate(), batch, queries, num_heads)
        gate_bth = jnp.broadcast_to(gate_BTH, (batch, queries, num_heads))[b][:, :, h]
        kernel_hVD = layer.out.kernel[...][h]
        found["head_output_residual"] = jnp.einsum("bthv,hvd,bth->bthd", found["head_output"], kernel_hVD, gate_bth)
    return {name: found[name] for name in what}
