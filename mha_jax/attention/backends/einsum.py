"""The reference backend: the whole T x S square at once, in plain JAX. Every other backend is tested against it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from mha_jax.attention.backends.call import Call, regular_groups
from mha_jax.attention.dropout import attention_keep
from mha_jax.attention.rule import Rule


def refusal(call: Call) -> str | None:
    """Why the backend cannot serve a call, and what would do; None where it can. This one can always."""
    return None


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    rule: Rule,
    dropout_rate: float,
    dropout_keys: Key[Array, "B"] | None,
    scale: float | Float[Array, ""],
    groups: tuple[int, ...],
    factor_HTS: Float[Array, "H T S"] | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of H heads over G groups, as `mha_jax.attention.attend` defines it; arguments are checked there.

      o[b,t,h] = sum over visible s of softmax_s(scale * <q[b,t,h], k[b,s,g]>) * v[b,s,g],  g = groups[h]

    `factor_HTS`, at least 0, multiplies the weights before they are made to sum to 1; where it is 0 nothing is seen.

    Computed as (sum of e * v) / (sum of e) with e = exp(logit - row maximum): the T x S square is never divided.
    """
    (batch, queries, heads, _), keys, wide = q.shape, k.shape[1], jnp.promote_types(q.dtype, jnp.float32)
    if heads == 0:
        return jnp.zeros((batch, queries, 0, v.shape[-1]), q.dtype)
    if groups != regular_groups(heads, k.shape[2]):
        k, v = (jnp.take(x, np.array(groups), axis=2) for x in (k, v))
    # Heads of one group stand one after the other, so they merge with T into the rows X of one product a group.
    merged = (batch, k.shape[2], heads // k.shape[2] * queries)
    visible_BHTS = rule.mask(queries, keys)
    if factor_HTS is not None:
        visible_BHTS = visible_BHTS & (factor_HTS > 0)[None]
    if not (rule.sees_self and queries == keys):
        q, k, v = _zero_invisible(q, k, v, visible_BHTS)
    q_BGXK, k_BGSK, v_BGSV = q.swapaxes(1, 2).reshape(*merged, q.shape[-1]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    logits_BGXS = jnp.einsum("BGXK,BGSK->BGXS", q_BGXK, k_BGSK, preferred_element_type=wide)
    logits_BHTS = jnp.where(visible_BHTS, logits_BGXS.reshape(batch, heads, queries, keys) * scale, -jnp.inf)
    # The floor is finite, so that an empty row gives exp(-inf) = 0 and not exp(-inf + inf).
    top_BHT1 = jax.lax.stop_gradient(logits_BHTS).max(axis=-1, keepdims=True, initial=jnp.finfo(wide).min)
    weights_BHTS = jnp.exp(logits_BHTS - top_BHT1)
    if factor_HTS is not None:
        weights_BHTS = weights_BHTS * factor_HTS[None].astype(wide)
    total_BHT1 = weights_BHTS.sum(axis=-1, keepdims=True)
    if dropout_rate > 0:
        assert dropout_keys is not None
        indices = (jnp.arange(size) for size in (heads, queries, keys))
        weights_BHTS = jnp.where(attention_keep(dropout_keys, *indices, rate=dropout_rate), weights_BHTS, 0)
        total_BHT1 = total_BHT1 * (1 - dropout_rate)
    weights_BGXS = weights_BHTS.astype(v.dtype).reshape(*merged, keys)
    out_BGXV = jnp.einsum("BGXS,BGSV->BGXV", weights_BGXS, v_BGSV, preferred_element_type=wide)
    # Rows of one matrix: with more axes, XLA on CPU takes several times as long for the gradient of the sums.
    share_N1 = (1 / jnp.where(total_BHT1 > 0, total_BHT1, 1)).reshape(batch * heads * queries, 1)
    out_NV = out_BGXV.reshape(batch * heads * queries, v.shape[-1]) * share_N1
    out_BHTV = out_NV.reshape(batch, heads, queries, v.shape[-1])
    return out_BHTV.swapaxes(1, 2).astype(q.dtype)


def _zero_invisible(
    q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, visible_BHTS: Bool[Array, "#B #H T S"]
) -> tuple[Array, Array, Array]:
    """Zeroes keys that nobody sees and queries that see nothing: in a product, 0 * NaN would reach others."""
    seen_BHS = visible_BHTS.any(axis=2)
    batch, heads, keys = seen_BHS.shape
    if heads > 1:
        seen_BHS = seen_BHS.reshape(batch, k_BSGK.shape[2], -1, keys).any(axis=2)
    seen_BSG1, sees_BTH1 = (x.swapaxes(1, 2)[..., None] for x in (seen_BHS, visible_BHTS.any(axis=3)))
    return jnp.where(sees_BTH1, q_BTHK, 0), jnp.where(seen_BSG1, k_BSGK, 0), jnp.where(seen_BSG1, v_BSGV, 0)
