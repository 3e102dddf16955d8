"""What the model loses when heads are taken away, or all but one, and something else is put in their place.

Attentions go by the names of `capture.attentions`. A batch is that of `models.losses.example_sums`, for one seed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import stats

from mha_jax.heads.capture import Batch, attentions, chosen_layers, real_queries
from mha_jax.heads.prefix import Prefix, run_prefix
from mha_jax.heads.tables import Heads, HeadTable
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError
from mha_jax.specs.checks import choice

_SUMS = {"loss": "loss", "accuracy": "correct"}


@dataclasses.dataclass(frozen=True)
class Ablated:
    """Loss (nats) and correct targets of E examples, summed over each one's targets, with and without N ablations.

    `whole` has "loss", "correct" and "weight", [E] each, of the model as it is; `sums` has {attention: [N, E]} for
    "loss" and "correct" with each of the ablations of that attention. `batch` [E] says which batch an example was in.
    """

    whole: dict[str, np.ndarray]
    sums: dict[str, Heads]
    batch: np.ndarray

    def table(self, metric: str = "loss") -> HeadTable:
        """Ablated minus whole, by batch: nats a target for "loss", share of targets for "accuracy".

        A head that is of use has a positive difference in loss and a negative one in accuracy. The table's p-values are
        those of `p_values`, adjusted for the number of all ablations in it (Holm 1979).

        Raises: UserError for fewer than two batches.
        """
        batches = np.arange(self.batch.max(initial=-1) + 1)
        in_batch_EB = (self.batch[:, None] == batches[None]).astype(np.float64)
        weights = self.whole["weight"] @ in_batch_EB
        share = 1 / np.maximum(weights, 1)
        by_batch = {name: d_NE @ in_batch_EB for name, d_NE in self._differences(metric).items()}
        values = {name: (d_NB * share[None]).T for name, d_NB in by_batch.items()}
        return HeadTable(values, weights, p_values=_holm(self.p_values(metric)))

    def p_values(self, metric: str = "loss") -> Heads:
        """{attention: [N]}: paired t-test over examples of no difference, two-sided, not adjusted for their number.

        A pair is one example's sum with and without the ablation; their mean is 0 where the difference a target is.
        Examples without targets do not count; equal sums throughout give 1.
        """
        real = self.whole["weight"] > 0
        return {name: _paired_test(d_NE[:, real]) for name, d_NE in self._differences(metric).items()}

    def _differences(self, metric: str) -> Heads:
        choice("metric", metric, tuple(_SUMS))
        name = _SUMS[metric]
        return {attention: x_NE - self.whole[name][None] for attention, x_NE in self.sums[name].items()}


def leave_one_out(
    task: str,
    model: Model,
    batches: Sequence[Batch],
    *,
    instead: str = "zero",
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Ablated:
    """Each head of the attentions named (default: all) taken away alone, N = H (Michel et al. 2019, section 3.2).

    Args:
      instead: what stands for the head's output before its projection. "zero": nothing, as a gate of 0. "mean": its
        mean over all real queries of the batches. "uniform": the mean of the values that each query sees, the head's
        attention being 1/L (Kovaleva et al. 2019, section 4.6). "resample": what it put out for another example of the
        batch, one drawn by `seed`, at the real position of the same number, counted round where that is shorter.
    Raises: UserError for an attention or `instead` that does not exist; for "resample" in a batch with one example.
    """
    return _ablations(task, model, batches, lambda heads: 1 - np.eye(heads), instead, names, seed)


def keep_one(task: str, model: Model, batches: Sequence[Batch], *, names: Sequence[str] | None = None) -> Ablated:
    """Each head alone in its attention, the others at gate 0, N = H (Michel et al. 2019, section 3.3, Tables 2 and 3).

    The best single head of an attention is the one with the least loss. Raises: UserError as `leave_one_out`.
    """
    return _ablations(task, model, batches, np.eye, "zero", names, 0)


def head_means(
    task: str, model: Model, batches: Sequence[Batch], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """{attention: [H, V]}: the mean of what each head puts out, over all real queries of the batches."""
    names = chosen_layers(model, names)
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    counts: dict[str, Any] = dict.fromkeys(names, 0.0)
    for batch in batches:
        prefix, real = run_prefix(task, model, batch), real_queries(model, batch)
        for name in names:
            own, count = _masked_sum(prefix.outputs(name), real[name.split("/")[0]])
            sums[name], counts[name] = sums[name] + np.asarray(own, np.float64), counts[name] + float(count)
    return {name: sums[name] / max(counts[name], 1) for name in names}


def _ablations(
    task: str,
    model: Model,
    batches: Sequence[Batch],
    gates: Callable[[int], np.ndarray],
    instead: str,
    names: Sequence[str] | None,
    seed: int,
) -> Ablated:
    """All batches with gates(H), [N, H], on every attention named."""
    choice("instead", instead, ("zero", "mean", "uniform", "resample"))
    present, names = attentions(model), chosen_layers(model, names)
    gates_of = {name: jnp.asarray(gates(present[name].shape.num_heads), present[name].gate.dtype) for name in names}
    means = head_means(task, model, batches, names) if instead == "mean" else None
    found = []
    for number, batch in enumerate(batches):
        prefix = run_prefix(task, model, batch)
        put = functools.partial(_put_instead, prefix, instead, means, np.random.default_rng((seed, number)))
        sums = {name: prefix.ablate(name, gates_of[name], put(name)) for name in names}
        # One transfer a batch: until then the next ablations are on their way while the last ones compute.
        found.append(jax.device_get((prefix.sums, sums)))
    return _gathered(found, names)


def _gathered(found: list[tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]], names: list[str]) -> Ablated:
    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.asarray(part, np.float64) for part in parts], axis=-1) if parts else np.zeros(0)

    whole = {sum_: joined([own[sum_] for own, _ in found]) for sum_ in ("loss", "correct", "weight")}
    sums = {
        sum_: {name: joined([ablated[name][sum_] for _, ablated in found]) for name in names}
        for sum_ in ("loss", "correct")
    }
    sizes = [len(own["weight"]) for own, _ in found]
    return Ablated(whole, sums, np.repeat(np.arange(len(sizes)), sizes))


def _put_instead(
    prefix: Prefix, instead: str, means: dict[str, np.ndarray] | None, rng: np.random.Generator, name: str
) -> Array | None:
    if instead == "zero":
        return None
    if instead == "uniform":
        return prefix.even_outputs(name)
    if means is not None:
        return jnp.asarray(means[name], prefix.inputs[name.split("/")[0]][0].dtype)[None, None]
    rows_B1, positions_BT = _donors(real_queries(prefix.model, prefix.batch)[name.split("/")[0]], rng)
    return prefix.outputs(name)[rows_B1, positions_BT]


def _donors(real_BT: Array, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The example and the positions, [B, 1] and [B, T], that each example takes outputs from: never its own.

    Real examples stand in a ring in random order, each takes from the next; those without a target keep their own.
    """
    real = np.asarray(real_BT)
    counts_B, rows = real.sum(axis=1), np.flatnonzero(real.any(axis=1))
    if len(rows) < 2:
        raise UserError(f"resampling needs another example in the batch; this one has {len(rows)} with targets")
    donors_B = np.arange(len(real))
    ring = rng.permutation(rows)
    donors_B[ring] = np.roll(ring, 1)
    order_BT = np.argsort(~real, axis=1, kind="stable")  # real positions first, in order
    turns_BT = np.arange(real.shape[1])[None] % np.maximum(counts_B[donors_B], 1)[:, None]
    return donors_B[:, None], np.take_along_axis(order_BT[donors_B], turns_BT, axis=1)


@jax.jit
def _masked_sum(o_BTHV: Array, real_BT: Array) -> tuple[Array, Array]:
    # where, not a product: a NaN beyond the end must not reach the mean.
    return jnp.where(real_BT[:, :, None, None], o_BTHV, 0).sum(axis=(0, 1)), real_BT.sum()


def _paired_test(differences_NE: np.ndarray) -> np.ndarray:
    p_N = np.ones(len(differences_NE))
    varies = np.ptp(differences_NE, axis=1) > 0 if differences_NE.shape[1] else np.zeros(len(p_N), bool)
    if varies.any():
        test: Any = stats.ttest_1samp(differences_NE[varies], 0.0, axis=1)  # its type does not know its fields
        p_N[varies] = test.pvalue
    return p_N


def _holm(p_values: Heads) -> Heads:
    """p(i), in rising order of all m, becomes the maximum over j <= i of min(1, (m - j + 1) p(j))."""
    p = np.concatenate(list(p_values.values())) if p_values else np.zeros(0)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.minimum(1, np.arange(len(p), 0, -1) * p[order]))
    ends = np.cumsum([len(own) for own in p_values.values()])
    return {name: adjusted[end - len(own) : end] for (name, own), end in zip(p_values.items(), ends, strict=True)}
