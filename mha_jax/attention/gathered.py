"""Attention that computes routed heads only where tokens use them: queries are gathered head by head.

The model itself computes all heads and gates them. This is the same function with less work, for measuring what routing
can save: of each head `capacity` queries at most are computed, the projections around them included. Keys and values
stay whole, as they may be read by tokens that use the head. On CPU it saves FLOPs and no time: gathers and scatters
take more than the products that are left out (`experiments.bench routing`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mha_jax.attention.multihead import MultiHeadAttention
from mha_jax.attention.visibility import Rule
from mha_jax.specs import UserError


def gathered_attention(
    layer: MultiHeadAttention, x_BTD: Float[Array, "B T D"], visibility: Rule, capacity: int
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """`layer(x, visibility=visibility)` of a routed layer, from `capacity` queries a routed head and example.

    Shared heads have all their queries.

    Returns: the output, and the share of (token, routed head) pairs in use that were beyond the capacity and left out,
    the last of a row first. Where it is 0 the output is the layer's to rounding.
    Raises: UserError for a layer without a router, with spans, biases or rope, or a capacity that is not 1 to T.
    """
    length = x_BTD.shape[1]
    _check(layer, capacity, length)
    assert layer.router is not None
    route, shared = layer.router(x_BTD), layer.router.spec.shared
    k_BSGK, v_BSGV = layer.keys_values(x_BTD)
    mask_BHTS = visibility.mask(length, length)

    def part(heads: slice, capacity: int) -> tuple[Array, Array]:
        gate_BTH = route.gate_BTH[..., heads]
        token_BHC, gate_BHC = _places(gate_BTH, capacity)
        groups = np.array(layer.shape.groups)[heads]
        x_BHCD = jax.vmap(lambda x_TD, token_HC: x_TD[token_HC])(x_BTD, token_BHC)
        q_BHCK = jnp.einsum("BHCD,DHK->BHCK", x_BHCD, layer.query.kernel[...][:, heads])
        logits_BHCS = jnp.einsum("BHCK,BSHK->BHCS", q_BHCK, k_BSGK[:, :, groups]) * layer.shape.qk_dim**-0.5
        visible_BHTS = jnp.broadcast_to(mask_BHTS, (*token_BHC.shape[:2], length, length))
        visible_BHCS = jnp.take_along_axis(visible_BHTS, token_BHC[..., None], axis=2)
        weights_BHCS = jax.nn.softmax(logits_BHCS, where=visible_BHCS)
        o_BHCV = jnp.einsum("BHCS,BSHV->BHCV", weights_BHCS, v_BSGV[:, :, groups])
        factor_BHC = gate_BHC * layer.head_gate()[heads][None, :, None]
        y_BHCD = jnp.einsum("BHCV,HVD->BHCD", o_BHCV * factor_BHC[..., None], layer.out.kernel[...][heads])
        added = jax.vmap(lambda y_HCD, token_HC: jnp.zeros_like(x_BTD[0]).at[token_HC].add(y_HCD))(y_BHCD, token_BHC)
        return added, jnp.sum(gate_BTH > 0) - jnp.sum(gate_BHC > 0)

    y_BTD, lost = part(slice(shared, None), capacity)
    if shared:
        y_BTD = y_BTD + part(slice(0, shared), length)[0]
    return y_BTD, lost / route.chosen_BTE.sum()


def _places(gate_BTH: Float[Array, "B T H"], capacity: int) -> tuple[Int[Array, "B H C"], Float[Array, "B H C"]]:
    """The first `capacity` tokens that use each head, and their factors; 0 where there are fewer."""
    gate_BHT = gate_BTH.swapaxes(1, 2)
    # A stable sort: tokens that use the head come first, in order, so that later ones do not change their places.
    token_BHC = jnp.argsort(gate_BHT <= 0, axis=-1, stable=True)[..., :capacity]
    return token_BHC, jnp.take_along_axis(gate_BHT, token_BHC, axis=-1)


def _check(layer: MultiHeadAttention, capacity: int, length: int) -> None:
    if layer.router is None:
        raise UserError("gathered attention needs a layer with a router: model.routing.kind is 'none'")
    if layer.span is not None or layer.rope or layer.query.bias is not None:
        raise UserError("gathered attention is for layers without adaptive spans, rope and biases")
    if not 1 <= capacity <= length:
        raise UserError(f"capacity={capacity} must be between 1 and the {length} tokens of a row")
