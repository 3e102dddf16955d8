"""In which order the heads of a trained model go, and what is left after so many: by any measure, and its controls.

Scores are {attention: [H]}, higher for heads that are worth more; heads go from the lowest score up.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mha_jax.attention.multihead import Gate
from mha_jax.heads.capture import Batch, attentions
from mha_jax.heads.surgery import Shapes
from mha_jax.models.losses import example_sums
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

Scores = dict[str, np.ndarray]
Keep = dict[str, tuple[int, ...]]


class Unit(NamedTuple):
    """What goes in one step: heads of one attention, all those of a group or one alone."""

    name: str
    heads: tuple[int, ...]


def random_scores(shapes: Shapes, seed: int) -> Scores:
    """The control: heads in any order, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return {name: rng.random(shape.num_heads) for name, shape in shapes.items()}


def reversed_scores(scores: Mapping[str, np.ndarray]) -> Scores:
    """The other control: the heads that are worth most go first."""
    return {name: -np.asarray(x_H, np.float64) for name, x_H in scores.items()}


def removal_order(
    shapes: Shapes, scores: Mapping[str, np.ndarray], *, per_layer: bool = False, by_groups: bool = False
) -> list[Unit]:
    """All heads of the scored attentions in the order in which they go.

    Args:    per_layer: every attention loses the same share of its heads at any moment, as far as whole heads allow;
             else heads of all attentions are compared with one another (Michel et al. 2019, section 4.2).
             by_groups: heads that read the same keys and values go together; a group is worth the mean of its heads.
    Raises:  UserError for scores that do not fit the model, or are not finite.
    """
    _check_scores(shapes, scores)
    ranked: list[tuple[float, float, Unit]] = []
    for name, score_H in scores.items():
        units = _units(name, shapes[name].groups, by_groups)
        worth = [float(np.mean([score_H[head] for head in unit.heads])) for unit in units]
        places = np.argsort(np.argsort(worth, kind="stable"), kind="stable")
        # The middle of a head's place in its layer: of layers that are cut alike, the worse head goes first.
        share = (places + 0.5) / max(len(units), 1) if per_layer else np.zeros(len(units))
        ranked += [(float(s), w, unit) for s, w, unit in zip(share, worth, units, strict=True)]
    return [unit for _, _, unit in sorted(ranked, key=lambda one: one[:2])]


def count_of_fraction(order: Sequence[Unit], fraction: float) -> int:
    """How many units a fraction of them is, halves rounded up. Raises: UserError outside 0 to 1."""
    if not 0 <= fraction <= 1:
        raise UserError(f"fraction={fraction} of the heads cannot be removed: it must be between 0 and 1")
    return int(fraction * len(order) + 0.5)


def what_is_left(shapes: Shapes, order: Sequence[Unit], count: int) -> Keep:
    """The heads of every attention after `count` units of the order are gone.

    Raises: UserError for more than there are.
    """
    if not 0 <= count <= len(order):
        raise UserError(f"count={count} cannot be removed: there are {len(order)} to choose from")
    gone = {(unit.name, head) for unit in order[:count] for head in unit.heads}
    return {
        name: tuple(head for head in range(shape.num_heads) if (name, head) not in gone)
        for name, shape in shapes.items()
    }


def masks(shapes: Shapes, order: Sequence[Unit], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """{attention: [N, H]}: for each of N counts, 0 for the heads that are gone by then and 1 for the others."""
    kept = [what_is_left(shapes, order, count) for count in counts]
    return {
        name: np.stack([np.isin(np.arange(shape.num_heads), keep[name]) for keep in kept]).astype(np.float32)
        for name, shape in shapes.items()
    }


def masked_sums(task: str, model: Model, batch: Batch, masks: Mapping[str, Array]) -> dict[str, Float[Array, " N"]]:
    """The sums of loss, correct predictions and weight over a batch with each of N masks [N, H] on the heads' gates.

    A mask of 0 is the head removed; nothing is built or compiled anew for another mask.
    """

    def one(mask: Mapping[str, Array]) -> dict[str, Array]:
        masked = nnx.clone(model, variables=False)
        for name, layer in attentions(masked).items():
            layer.gate = Gate(layer.gate[...] * mask[name])
        sums = example_sums(task, masked, batch)
        return {name: jnp.sum(sums[name]) for name in ("loss", "correct", "weight")}

    return jax.lax.map(one, masks)


def _units(name: str, groups: Sequence[int], by_groups: bool) -> list[Unit]:
    if not by_groups:
        return [Unit(name, (head,)) for head in range(len(groups))]
    return [Unit(name, tuple(h for h, g in enumerate(groups) if g == group)) for group in sorted(set(groups))]


def _check_scores(shapes: Shapes, scores: Mapping[str, np.ndarray]) -> None:
    for name, score_H in scores.items():
        if name not in shapes or np.shape(score_H) != (shapes[name].num_heads,):
            wanted = f"has {shapes[name].num_heads} heads" if name in shapes else "is no attention of the model"
            raise UserError(f"scores of {name} have the shape {np.shape(score_H)}; it {wanted}")
        if not np.all(np.isfinite(score_H)):
            raise UserError(f"scores of {name} are not all finite: {np.asarray(score_H)}")
