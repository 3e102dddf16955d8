"""How the loss of each example would change with each head's gate: gradient importance (Michel et al. 2019)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from mha_jax.attention.multihead import Gate
from mha_jax.heads.capture import Batch, attentions
from mha_jax.heads.tables import Heads
from mha_jax.models.losses import example_sums
from mha_jax.models.transformer import Model


def gate_gradients(task: str, model: Model, batch: Batch) -> dict[str, Array]:
    """{attention: [B, H]}: dL(x)/dxi_h at xi = 1 of every example x and head h, in nats a target.

    One backward pass over the batch gives all of them:

      o[b,t,h] becomes xi[b,h] * o[b,t,h], on top of the layer's own gate      (Michel et al. 2019, section 4.1)

    L(x) is the mean negative log-likelihood of the example's own targets, without label smoothing or dropout: a long
    text counts as much as a short one. No example's loss depends on another's gates, so the gradient of the sum over
    examples holds each one's own. An example without targets has gradient 0.
    """
    ones = {
        name: jnp.ones((len(batch["weights"]), layer.shape.num_heads), layer.gate[...].dtype)
        for name, layer in attentions(model).items()
    }

    def total(factors: dict[str, Array]) -> Array:
        gated = nnx.clone(model, variables=False)
        for name, layer in attentions(gated).items():
            layer.gate = Gate(layer.gate[...][None] * factors[name])
        sums = example_sums(task, gated, batch)
        return jnp.sum(sums["loss"] / jnp.maximum(sums["weight"], 1))

    return jax.grad(total)(ones)


def mean_sizes(task: str, model: Model, batch: Batch) -> tuple[dict[str, Array], Int[Array, ""]]:
    """{attention: [H]}: the mean over examples with targets of |dL(x)/dxi_h|; and how many examples those are."""
    counted_B = jnp.asarray(batch["weights"]).reshape(len(batch["weights"]), -1).max(axis=1) > 0
    count = counted_B.sum()
    # An example's size is taken before the mean, so that effects of opposite sign do not cancel.
    found = gate_gradients(task, model, batch)
    sizes = {name: jnp.abs(x_BH).sum(axis=0) / jnp.maximum(count, 1) for name, x_BH in found.items()}
    return sizes, count


def unit_layers(values: Heads, mean: Heads) -> Heads:
    """Values [N, H] divided by the l2 norm of their attention's mean [H], which then has norm 1; 0 stays 0.

    (Michel et al. 2019, section 4.1, after Molchanov et al. 2017: scores of a layer are divided by that layer's norm.)
    """
    norms = {name: float(np.linalg.norm(mean_H)) for name, mean_H in mean.items()}
    return {name: x_NH / (norms[name] or 1.0) for name, x_NH in values.items()}
