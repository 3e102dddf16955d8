"""Shapes of attention maps after Kovaleva et al. 2019 (section 4.1), by rules.

The paper's classifier learned the five shapes from 400 maps labelled by hand, which are not public; so the shares found
by these rules are comparable with each other, and with the paper's only in what they are large for.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SHAPES = ("vertical", "diagonal", "vertical+diagonal", "block", "heterogeneous")


@dataclasses.dataclass(frozen=True)
class ShapeRules:
    """Shares of all attention of a map's queries, all our own.

    stripes   vertical (the two keys with the most attention) and diagonal (keys at most 1 away) together have this much
    mixed     and where either alone has this much, the map is vertical+diagonal; else the larger names it
    block     without such stripes: attention within the query's own block, (share - even) / (1 - even), with `even` the
              share of even attention; blocks are parted by special tokens, as [SEP] parts two sentences
    """

    stripes: float = 0.5
    mixed: float = 0.25
    block: float = 0.5


def map_shapes(
    weights_BHTS: Float[Array, "B H T T"],
    visible_BhTS: Bool[Array, "B h T T"],
    counted_BT: Bool[Array, "B T"],
    special_BS: Bool[Array, "B T"],
    rules: ShapeRules = ShapeRules(),
) -> Float[Array, "B H 5"]:
    """1 at the shape of each map, in the order of `SHAPES`; 0 throughout for an example without counted queries.

    Attention is averaged over the queries of `counted_BT` that see more than one key. The order of the rules decides
    where several fit: stripes before blocks, and what is neither is heterogeneous.
    """
    asked_BhT = counted_BT[:, None] & (visible_BhTS.sum(axis=3) > 1)
    weights_BHTS = jnp.where(asked_BhT[..., None], weights_BHTS, 0)
    queries_Bh = jnp.maximum(asked_BhT.sum(axis=2), 1)

    def share(inside: Array) -> Array:
        return jnp.where(inside, weights_BHTS, 0).sum(axis=(2, 3)) / queries_Bh

    positions = jnp.arange(counted_BT.shape[1])
    column_BHS = weights_BHTS.sum(axis=2)
    # By place, not by value: of even attention all columns are alike.
    top_BH2 = jax.lax.top_k(column_BHS, min(2, len(positions)))[1]
    on_column = jax.nn.one_hot(top_BH2, len(positions), dtype=bool).any(axis=2)[:, :, None]
    on_diagonal = (abs(positions[:, None] - positions[None]) <= 1)[None, None]
    vertical, diagonal, either = share(on_column), share(on_diagonal), share(on_column | on_diagonal)

    number_BT = jnp.cumsum(special_BS, axis=1)
    own_BTS = (number_BT[:, :, None] == number_BT[:, None]) & ~special_BS[:, None]
    seen_BhT1 = jnp.maximum(visible_BhTS.sum(axis=3, keepdims=True), 1)
    even_Bh = jnp.where(own_BTS[:, None] & visible_BhTS & asked_BhT[..., None], 1 / seen_BhT1, 0).sum(axis=(2, 3))
    even_Bh = even_Bh / queries_Bh
    within = (share(own_BTS[:, None]) - even_Bh) / jnp.maximum(1 - even_Bh, 1e-6)
    # A single block is the whole text, in which attention always is.
    parted_B1 = (jnp.where(counted_BT, number_BT, -1).max(axis=1) > _first_number(number_BT, counted_BT))[:, None]

    striped = either >= rules.stripes
    mixed = striped & (jnp.minimum(vertical, diagonal) >= rules.mixed)
    block = ~striped & parted_B1 & (within >= rules.block)
    found = jnp.stack(
        [
            striped & ~mixed & (vertical >= diagonal),
            striped & ~mixed & (vertical < diagonal),
            mixed,
            block,
            ~striped & ~block,
        ],
        axis=-1,
    )
    return (found & asked_BhT.any(axis=2)[..., None]).astype(jnp.float32)


def _first_number(number_BT: Array, counted_BT: Array) -> Array:
    return jnp.where(counted_BT, number_BT, jnp.iinfo(jnp.int32).max).min(axis=1)
