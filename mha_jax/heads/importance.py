"""What each head of a model is worth, by every measure of one list, each with its error over batches."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.heads.ablation import keep_one, leave_one_out
from mha_jax.heads.capture import Batch, attentions, chosen_layers
from mha_jax.heads.gradients import mean_sizes, unit_layers
from mha_jax.heads.norms import NORMS, weight_norms
from mha_jax.heads.shapley import MOST_EXACT, layer_shapley
from mha_jax.heads.spread import attention_spread
from mha_jax.heads.tables import HeadTable, check_batches
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

ATTENTION = ("confidence", "variance", "norm_variance")
GRADIENTS = ("gradient", "gradient_normalised")
LEAVE_ONE_OUT = ("leave_one_out", "leave_one_out_accuracy")
COSTLY = ("mean", "uniform", "resample", "keep_one", "shapley")
# Those that take about as long as one another; the rest has to be asked for.
DEFAULT = (*NORMS, *ATTENTION, *GRADIENTS, *LEAVE_ONE_OUT)
MEASURES = (*DEFAULT, *COSTLY)
# Random orders of the heads, a batch, where an attention has too many for exact Shapley values.
PERMUTATIONS = 32

_spread = jax.jit(attention_spread)
_sizes = jax.jit(mean_sizes, static_argnums=0)


def importance(
    task: str,
    model: Model,
    batches: Sequence[Batch],
    measures: Sequence[str] = DEFAULT,
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

    leave_one_out        loss without the head minus loss with it, in nats a target (`ablation.leave_one_out`)
    leave_one_out_accuracy  share of targets predicted with the head minus that without it
    mean, uniform, resample  leave_one_out with the head's mean, with even attention, or with its output for another
                         example in its place
    keep_one             loss of the model minus loss with the head alone in its attention (`ablation.keep_one`)
    shapley              of the heads of each attention, in nats a target (`shapley.layer_shapley`): exact up to
                         `MOST_EXACT` heads, else over PERMUTATIONS orders a batch

    Values of a batch are means over its queries or targets, with its targets as weight; those of gradients are means
    over its examples, with their number as weight. Ablations have p-values of a paired test over examples.

    Raises: UserError for an unknown measure or attention, for no data, and for fewer than two batches.
    """
    check_measures(measures)
    check_batches(len(batches))
    names = chosen_layers(model, layers)
    norms = _of_norms(model, names)
    tables = dict(norms)
    if set(measures) & set(ATTENTION):
        tables |= _of_attention(model, batches, norms["norm"])
    if set(measures) & set(GRADIENTS):
        tables |= _of_gradients(task, model, batches, names)
    tables |= _of_ablations(task, model, batches, names, set(measures))
    return {measure: tables[measure] for measure in measures}


def check_measures(measures: Sequence[str]) -> None:
    """Raises UserError for a measure that does not exist, or for none."""
    unknown = [measure for measure in measures if measure not in MEASURES]
    if unknown or not measures:
        raise UserError(f"there is no measure {unknown[0] if unknown else ''!r}; there are {', '.join(MEASURES)}")


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


def _of_ablations(
    task: str, model: Model, batches: Sequence[Batch], names: Sequence[str], measures: set[str]
) -> dict[str, HeadTable]:
    tables = {}
    if measures & set(LEAVE_ONE_OUT):
        found = leave_one_out(task, model, batches, names=names)
        tables = {"leave_one_out": found.table(), "leave_one_out_accuracy": _negative(found.table("accuracy"))}
    for instead in measures & {"mean", "uniform", "resample"}:
        tables[instead] = leave_one_out(task, model, batches, instead=instead, names=names).table()
    if "keep_one" in measures:
        tables["keep_one"] = _negative(keep_one(task, model, batches, names=names).table())
    if "shapley" in measures:
        tables["shapley"] = _shapley(task, model, batches, names)
    return tables


def _negative(table: HeadTable) -> HeadTable:
    return dataclasses.replace(table, values={name: -x_NH for name, x_NH in table.values.items()})


def _shapley(task: str, model: Model, batches: Sequence[Batch], names: Sequence[str]) -> HeadTable:
    few = [name for name in names if attentions(model)[name].shape.num_heads <= MOST_EXACT]
    many = [name for name in names if name not in few]
    exact = layer_shapley(task, model, batches, names=few)
    sampled = layer_shapley(task, model, batches, names=many, permutations=PERMUTATIONS)
    return dataclasses.replace(exact, values={name: (exact.values | sampled.values)[name] for name in names})
