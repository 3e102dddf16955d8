"""What each head of a model is worth, by every measure of one list, each with its error over batches."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.heads.capture import Batch, attentions
from mha_jax.heads.gradients import mean_sizes, unit_layers
from mha_jax.heads.norms import NORMS, weight_norms
from mha_jax.heads.spread import attention_spread
from mha_jax.heads.tables import HeadTable, check_batches
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

ATTENTION = ("confidence", "variance", "norm_variance")
GRADIENTS = ("gradient", "gradient_normalised")
MEASURES = (*NORMS, *ATTENTION, *GRADIENTS)
DEFAULT = MEASURES

_spread = jax.jit(attention_spread)
_sizes = jax.jit(mean_sizes, static_argnums=0)


def importance(
    task: str,
    model: Model,
    batches: Sequence[Batch],
    measures: Sequence[str] = MEASURES,
    layers: Sequence[str] | None = None,
) -> dict[str, HeadTable]:
    """{measure: table of the heads of the chosen attentions (default: all)}, in the order asked for.

    More is more important in every one:

    query_norm, key_norm, value_norm, out_norm, norm  of the head's weights (`weight_norms`): exact, without error
    confidence           mean of the greatest attention weight (`attention_spread`; Voita et al. 2019)
    variance             of the attention weights over the queries of a text (`attention_spread`)
    norm_variance        norm times variance
    gradient             I_h = E over x of |dL(x)/dxi_h|, in nats a target (`mean_sizes`; Michel et al. 2019, eq. 2)
    gradient_normalised  the same, divided by its l2 norm over the heads of the attention

    Values of a batch are means over its queries, with the batch's targets as weight; those of gradients are means over
    its examples, with their number as weight.

    Raises: UserError for an unknown measure or attention, for no data, and for fewer than two batches.
    """
    check_measures(measures)
    check_batches(len(batches))
    names = _chosen(model, layers)
    norms = _of_norms(model, names)
    tables = dict(norms)
    if set(measures) & set(ATTENTION):
        tables |= _of_attention(model, batches, norms["norm"])
    if set(measures) & set(GRADIENTS):
        tables |= _of_gradients(task, model, batches, names)
    return {measure: tables[measure] for measure in measures}


def check_measures(measures: Sequence[str]) -> None:
    """Raises UserError for a measure that does not exist, or for none."""
    unknown = [measure for measure in measures if measure not in MEASURES]
    if unknown or not measures:
        raise UserError(f"there is no measure {unknown[0] if unknown else ''!r}; there are {', '.join(MEASURES)}")


def _chosen(model: Model, layers: Sequence[str] | None) -> list[str]:
    present = list(attentions(model))
    for name in layers or ():
        if name not in present:
            raise UserError(f"there is no attention {name!r}; there are {', '.join(present)}")
    return present if layers is None else list(layers)


def _of_norms(model: Model, names: Sequence[str]) -> dict[str, HeadTable]:
    found = weight_norms(model)
    return {measure: HeadTable.of_weights({name: found[measure][name] for name in names}) for measure in NORMS}


def _of_attention(model: Model, batches: Sequence[Batch], norm: HeadTable) -> dict[str, HeadTable]:
    found = [_spread(model, batch) for batch in batches]
    weights = np.array([float(jnp.sum(batch["weights"])) for batch in batches])
    confidence = {name: np.stack([np.asarray(one[name].confidence) for one in found]) for name in norm.mean}
    variance = {name: np.stack([np.asarray(one[name].variance) for one in found]) for name in norm.mean}
    product = {name: norm_H[None] * variance[name] for name, norm_H in norm.mean.items()}
    return {
        measure: HeadTable(values, weights)
        for measure, values in zip(ATTENTION, (confidence, variance, product), strict=True)
    }


def _of_gradients(task: str, model: Model, batches: Sequence[Batch], names: Sequence[str]) -> dict[str, HeadTable]:
    found = [_sizes(task, model, batch) for batch in batches]
    weights = np.array([float(count) for _, count in found])
    table = HeadTable({name: np.stack([np.asarray(sizes[name]) for sizes, _ in found]) for name in names}, weights)
    # The norm is that of the mean over all batches, as in the paper: only the values of a batch keep their spread.
    return {"gradient": table, "gradient_normalised": HeadTable(unit_layers(table.values, table.mean), table.weights)}
