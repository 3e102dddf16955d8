"""How sharp a head's attention is, and how much it changes from query to query, without the T x S matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mha_jax.attention.attend import attend
from mha_jax.attention.statistics import attend_with_statistics
from mha_jax.heads.capture import Attended, Batch, real_queries, watch
from mha_jax.models.transformer import Model
from mha_jax.specs import EOS


class Spread(NamedTuple):
    """Means over the queries of a batch that are real tokens, float32 [H]; 0 where there are none.

    confidence  max over s of w[t,s]                                 (Voita et al. 2019, section 4)
    variance    |w[t,:] - m|^2 = sum over s of (w[t,s] - m[s])^2, with m the mean of w[t,:] over the text's queries
    """

    confidence: Array
    variance: Array


def attention_spread(model: Model, batch: Batch) -> dict[str, Spread]:
    """{attention: Spread}, from weights before dropout and gates.

    Real tokens are neither padding nor EOS: it stands where texts end, is no word, and Voita et al. leave it out too.
    As a key it may still be attended to.

    The variance, between 0 and 1, is a definition of our own: over the queries of one text, averaged over texts by
    their queries. It is 0 for a head that looks at the same places whatever the query, evenly at all or always at one
    token (the "no-op" of Clark et al. 2019, section 3.2): such a head adds the same vector everywhere in the text.
    """
    tokens = {"encoder": "source", "decoder": "target_inputs"} if "source" in batch else {}
    real = real_queries(model, batch)

    def look(name: str, attended: Attended) -> Spread:
        stack = name.split("/")[0]
        return _spread(attended, real[stack] & (batch[tokens.get(stack, "inputs")] != EOS))

    return watch(model, batch, look)[1]


def _spread(attended: Attended, real_BT: Bool[Array, "B T"]) -> Spread:
    layer, q_BTHK, k_BSGK, _, visibility, _ = attended
    # Each head's own copy of its keys, so that what is summed over queries stays apart for heads of one group.
    k_BSHK = k_BSGK[:, :, np.asarray(layer.shape.groups, int)]
    none_BSH1 = jnp.zeros((*k_BSHK.shape[:3], 1), q_BTHK.dtype)
    scale, real_BT1 = layer.shape.qk_dim**-0.5, real_BT[:, :, None]

    def greatest(scale: float) -> Float[Array, "B T H"]:
        return attend_with_statistics(q_BTHK, k_BSHK, none_BSH1, visibility, scale)[1].max_weight

    def output(v_BSH1: Array) -> Array:
        return attend(q_BTHK, k_BSHK, v_BSH1, visibility, scale=scale, backend="blockwise")

    max_BTH, sharp_BTH = greatest(scale), greatest(2 * scale)
    # With Z the sum of exp(logit), max(w) = exp(top) / Z; so the sum of w^2 is Z of doubled logits over Z^2:
    squares_BTH = jnp.where(sharp_BTH > 0, max_BTH**2 / jnp.where(sharp_BTH > 0, sharp_BTH, 1), 0)
    # The gradient of the sum over t of w[t,s] v[s] by v[s]: the weight that each key gets, without a square either.
    out_BTH1, pull = jax.vjp(output, none_BSH1)
    (column_BSH1,) = pull(jnp.broadcast_to(real_BT1[..., None], out_BTH1.shape).astype(out_BTH1.dtype))
    column_BSH = column_BSH1[..., 0].astype(jnp.float32)
    count_B = real_BT.sum(axis=1)
    # sum over t of |w - m|^2 = sum over t of |w|^2 - |sum over t of w|^2 / n, of each text.
    squared_BH = jnp.where(real_BT1, squares_BTH, 0).sum(axis=1)
    deviation_BH = squared_BH - jnp.square(column_BSH).sum(axis=1) / jnp.maximum(count_B, 1)[:, None]
    count = jnp.maximum(count_B.sum(), 1)
    confidence_H = jnp.where(real_BT1, max_BTH, 0).sum(axis=(0, 1)) / count
    return Spread(confidence_H, jnp.maximum(deviation_BH, 0).sum(axis=0) / count)
