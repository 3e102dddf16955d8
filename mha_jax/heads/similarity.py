"""How alike heads are: what they attend to, what they write, and which subspaces their weights read and write.

Heads are compared within a kind (encoder, decoder, cross), pair by pair, over the layers of one model or between two
models that read the same batches. What a head writes is gate[h] * o[b,t,h] @ out.kernel[h], so nothing here depends on
the basis inside a head.

Bounds, for N heads of width V against M of the other side (N = M = 192 in 12 layers of 16 heads): a batch's sums are
(N V) x (M V) float32 numbers, 604 MB at V = 64 and 38 MB at V = 16, of which a few are held; the queries of a batch
whose attention is compared are sampled so that about `_TERMS` logarithms are taken, and the attention of all heads is
held for one position of a text at a time, never T x S.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mha_jax.attention.regions import Span
from mha_jax.heads.capture import Attended, Batch, attentions, kind_of, real_queries, watch
from mha_jax.heads.overlap import weight_overlap
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

MEASURES = {
    "js": "Jensen-Shannon distance of attention (base 2, mean over queries): 0 the same keys, 1 never the same key",
    "cka": "linear CKA of what heads write: 1 the same up to rotation and scale, 0 uncorrelated",
    "angles": "mean squared cosine of the principal angles between what heads write: 1 linear maps of each other, "
    "0 uncorrelated",
    "weights": "overlap of the subspaces that W_V reads, times that of those that W_O writes: 1 the same, 0 orthogonal",
}
# About so many terms p log p a batch: a few seconds on two cores.
_TERMS = 2**30
# Directions of less than 1 % of the largest deviation are taken as rounding.
_RANK = 1e-4


class Head(NamedTuple):
    """One head: its attention's name and its number there."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One measure of every pair of a head of `rows` and one of `columns`: float64 [N, M].

    `value` is as MEASURES says; `standard_error` is over batches (the jackknife's), None where no data is read.
    Within one model rows and columns are the same heads, and the matrix is symmetric.
    """

    measure: str
    rows: tuple[Head, ...]
    columns: tuple[Head, ...]
    value: np.ndarray
    standard_error: np.ndarray | None

    @property
    def distance(self) -> np.ndarray:
        """0 the same, 1 nothing in common, whatever the measure."""
        return self.value if self.measure == "js" else 1 - self.value


def kinds_of(model: Model) -> dict[str, tuple[Head, ...]]:
    """{kind: its heads}, layer by layer; kinds without heads are left out."""
    kinds: dict[str, tuple[Head, ...]] = {}
    for name, layer in attentions(model).items():
        if layer.shape.num_heads:
            heads = tuple(Head(name, number) for number in range(layer.shape.num_heads))
            kinds[kind_of(name)] = kinds.get(kind_of(name), ()) + heads
    return kinds


def compare(
    model: Model, batches: Sequence[Batch], measures: Sequence[str], other: Model | None = None
) -> dict[str, dict[str, Pairs]]:
    """{kind: {measure: pairs}} of the heads of a model, or of those of a model (rows) and of another (columns).

    Raises: UserError for an unknown measure, fewer than two batches for a measure that reads them, or two models
      whose weights act on spaces of different width.
    """
    for measure in measures:
        if measure not in MEASURES:
            raise UserError(f"unknown measure {measure!r}; known are {', '.join(MEASURES)}")
    of_data = tuple(measure for measure in measures if measure != "weights")
    rows, columns = kinds_of(model), kinds_of(model if other is None else other)
    kinds = [kind for kind in rows if kind in columns]
    values: dict[str, Any] = {kind: {} for kind in kinds}
    errors: dict[str, Any] = {kind: {} for kind in kinds}
    if of_data:
        if len(batches) < 2:
            raise UserError(f"comparing heads over {len(batches)} batches has no error bar; give at least 2")
        observed = jax.jit(functools.partial(_observe, of_data))

        def sums(number: int) -> Any:
            return observed(model, other, batches[number], jax.random.key(number))

        values, errors = jackknife(sums, len(batches), jax.jit(functools.partial(_estimate, of_data)))
    if "weights" in measures:
        for kind in kinds:
            values[kind]["weights"], errors[kind]["weights"] = weight_overlap(kind, model, other), None
    return {
        kind: {
            measure: _pairs(measure, rows[kind], columns[kind], values[kind][measure], errors[kind][measure], other)
            for measure in measures
        }
        for kind in kinds
    }


def jackknife(sums: Callable[[int], Any], count: int, estimate: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What follows from the sums of all batches, and its standard error, by leaving out one batch at a time.

      se^2 = (n - 1) / n * sum over i of (estimate without i - mean of these)^2     (Efron & Tibshirani 1993, eq. 11.5)

    Sums of a batch are made twice rather than kept, so that only those of all and of one batch are held.
    """
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), map(sums, range(count)))
    without = [jax.device_get(estimate(jax.tree.map(jnp.subtract, total, sums(number)))) for number in range(count)]
    errors = jax.tree.map(lambda *parts: np.sqrt((count - 1) * np.var(np.asarray(parts, np.float64), axis=0)), *without)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(estimate(total))), errors


def _pairs(
    measure: str, rows: tuple[Head, ...], columns: tuple[Head, ...], value: Any, error: Any, other: Model | None
) -> Pairs:
    if other is None:
        # Symmetric but for rounding; and a head that writes nothing is still itself.
        value = (value + value.T) / 2
        np.fill_diagonal(value, 0.0 if measure == "js" else 1.0)
        if error is not None:
            error = (error + error.T) / 2
            np.fill_diagonal(error, 0.0)
    return Pairs(measure, rows, columns, value, error)


def _observe(
    measures: tuple[str, ...], model: Model, other: Model | None, batch: Batch, key: Key[Array, ""]
) -> dict[str, dict[str, Any]]:
    """What the measures are made of, by kind; sums of several batches add up."""
    real = real_queries(model, batch)
    rows = _by_kind(model, batch)
    columns = rows if other is None else _by_kind(other, batch)
    found: dict[str, dict[str, Any]] = {}
    for kind in (kind for kind in rows if kind in columns):
        real_BT = real["encoder" if kind == "encoder" else "decoder"]
        found[kind] = {}
        if "js" in measures:
            found[kind]["attention"] = _attention_sums(rows[kind], columns[kind], real_BT, key)
        if "cka" in measures or "angles" in measures:
            found[kind]["written"] = _written_sums(rows[kind], columns[kind], real_BT)
    return found


def _estimate(measures: tuple[str, ...], sums: dict[str, dict[str, Any]]) -> dict[str, dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {}
    for kind, parts in sums.items():
        found[kind] = {}
        if "js" in measures:
            total_NM, count = parts["attention"]
            found[kind]["js"] = total_NM / jnp.maximum(count, 1)
        if "cka" in measures:
            found[kind]["cka"] = cka(*parts["written"])
        if "angles" in measures:
            cosine_NVMU, least_NM = cosines(*parts["written"])
            found[kind]["angles"] = jnp.sum(cosine_NVMU**2, axis=(1, 3)) / jnp.maximum(least_NM, 1)
    return found


def _by_kind(model: Model, batch: Batch) -> dict[str, list[Attended]]:
    kinds: dict[str, list[Attended]] = {}
    for name, attended in watch(model, batch, lambda _, attended: attended)[1].items():
        if attended.layer.shape.num_heads:
            kinds.setdefault(kind_of(name), []).append(attended)
    return kinds


def _attention_sums(
    rows: list[Attended], columns: list[Attended], real_BT: Bool[Array, "B T"], key: Key[Array, ""]
) -> tuple[Float[Array, "N M"], Float[Array, ""]]:
    """The sum over sampled real queries of the Jensen-Shannon distance, and how many they were.

    JS(p, q)^2 = H((p + q) / 2) - (H(p) + H(q)) / 2,  H in bits      (Lin 1991; its root is a metric)
    """
    (batch, length), keys = real_BT.shape, rows[0].k_BSGK.shape[1]
    num_rows, num_columns = (sum(one.q_BTHK.shape[2] for one in side) for side in (rows, columns))
    positions = min(max(_TERMS // (batch * keys * num_rows * num_columns), 1), length)

    def add(total_NM: Array, t: Array) -> tuple[Array, None]:
        p_NBS = jnp.concatenate([_weights_at(one, t) for one in rows])
        q_MBS = p_NBS if columns is rows else jnp.concatenate([_weights_at(one, t) for one in columns])
        q_MB, real_1B = _bits(q_MBS), real_BT[:, t][None]

        def distances(p_BS: Array) -> Array:
            squares_MB = _bits((p_BS[None] + q_MBS) / 2) - (_bits(p_BS)[None] + q_MB) / 2
            return jnp.sum(jnp.sqrt(jnp.maximum(squares_MB, 0)) * real_1B, axis=1)

        return total_NM + lax.map(distances, p_NBS), None

    sampled = jax.random.permutation(key, length)[:positions]
    total_NM, _ = lax.scan(add, jnp.zeros((num_rows, num_columns)), sampled)
    return total_NM, jnp.sum(real_BT[:, sampled], dtype=jnp.float32)


def _weights_at(attended: Attended, t: Int[Array, ""]) -> Float[Array, "H B S"]:
    """The attention of query t of every example; 0 where it sees nothing."""
    layer, q_BTHK, k_BSGK, _, visibility, _ = attended
    k_BSHK = k_BSGK[:, :, np.asarray(layer.shape.groups, int)].astype(jnp.float32)
    logits_HBS = jnp.einsum("BHK,BSHK->HBS", q_BTHK[:, t].astype(jnp.float32), k_BSHK) * layer.shape.qk_dim**-0.5
    visible_HBS = visibility.at(None, None, Span(t, 1), Span(0, k_BSHK.shape[1]))[:, :, 0].swapaxes(0, 1)
    logits_HBS = jnp.where(visible_HBS, logits_HBS, -jnp.inf)
    # The floor is finite, so that a query that sees nothing gives 0.
    powers_HBS = jnp.exp(logits_HBS - logits_HBS.max(-1, keepdims=True, initial=jnp.finfo(jnp.float32).min))
    total_HB1 = powers_HBS.sum(-1, keepdims=True)
    return powers_HBS / jnp.where(total_HB1 > 0, total_HB1, 1)


def _bits(p: Array) -> Array:
    return jax.scipy.special.entr(p).sum(-1) / np.log(2).astype(np.float32)


def _written_sums(
    rows: list[Attended], columns: list[Attended], real_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, "N V V"], Float[Array, "M U U"], Float[Array, "N V M U"]]:
    """Sums over the batch's real queries of products of what heads write less its mean over them.

    Means are the batch's own, so that a large constant in what a head writes costs no digits.
    """
    x_PNV = _written(rows, real_BT)
    y_PMU = x_PNV if columns is rows else _written(columns, real_BT)
    own_NVV, own_MUU = (jnp.einsum("PNV,PNW->NVW", z, z) for z in (x_PNV, y_PMU))
    product = x_PNV.reshape(len(x_PNV), -1).T @ y_PMU.reshape(len(y_PMU), -1)
    return own_NVV, own_MUU, product.reshape(*x_PNV.shape[1:], *y_PMU.shape[1:])


def _written(side: list[Attended], real_BT: Bool[Array, "B T"]) -> Float[Array, "P N V"]:
    """What every head writes at every query, in an orthonormal basis of what it can write; padded with zeros to V."""
    width = max(min(one.layer.shape.v_dim, one.layer.d_model) for one in side)
    real_P11 = real_BT.reshape(-1, 1, 1)
    found = []
    for layer, q_BTHK, k_BSGK, v_BSGV, visibility, _ in side:
        o_BTHV = layer.attended(q_BTHK, k_BSGK, v_BSGV, visibility)
        kernel_HDV = (layer.head_gate()[:, None, None] * layer.out.kernel[...]).astype(jnp.float32).swapaxes(1, 2)
        # out.kernel[h] = R^T Q^T with orthonormal Q: o R^T has the inner products of o out.kernel[h], and is V wide.
        r_HWV = jnp.linalg.qr(kernel_HDV, mode="r")
        x_BTHW = jnp.einsum("BTHV,HWV->BTHW", o_BTHV.astype(jnp.float32), r_HWV)
        x_PHW = x_BTHW.reshape(-1, *x_BTHW.shape[2:])
        found.append(jnp.pad(x_PHW, ((0, 0), (0, 0), (0, width - x_PHW.shape[2]))))
    x_PNV = jnp.where(real_P11, jnp.concatenate(found, axis=1), 0)
    mean_NV = x_PNV.sum(0) / jnp.maximum(real_P11.sum(), 1)
    return jnp.where(real_P11, x_PNV - mean_NV[None], 0)


def cka(
    own_NVV: Float[Array, "N V V"], own_MUU: Float[Array, "M U U"], cross_NVMU: Float[Array, "N V M U"]
) -> Float[Array, "N M"]:
    """Linear centred kernel alignment from covariances; 0 with what does not vary.

    CKA(X, Y) = |Y^T X|^2 / (|X^T X| |Y^T Y|), Frobenius norms of centred X and Y   (Kornblith et al. 2019, section 3)
    """
    norm_N, norm_M = (jnp.sqrt(jnp.sum(own**2, axis=(1, 2))) for own in (own_NVV, own_MUU))
    norm_NM = norm_N[:, None] * norm_M[None]
    return jnp.sum(cross_NVMU**2, axis=(1, 3)) / jnp.where(norm_NM > 0, norm_NM, 1)


def cosines(
    own_NVV: Float[Array, "N V V"], own_MUU: Float[Array, "M U U"], cross_NVMU: Float[Array, "N V M U"]
) -> tuple[Float[Array, "N V M U"], Int[Array, "N M"]]:
    """Covariances after whitening each head, and the least number of directions of each pair.

    The singular values of [n, :, m, :] are the cosines of the principal angles between the spaces, in R^queries, that
    what two heads write spans (Björck & Golub 1973): their canonical correlations.
    """
    (white_NVA, rank_N), (white_MUB, rank_M) = _whitening(own_NVV), _whitening(own_MUU)
    white_NAMU = jnp.einsum("NVA,NVMU->NAMU", white_NVA, cross_NVMU)
    return jnp.einsum("NAMU,MUB->NAMB", white_NAMU, white_MUB), jnp.minimum(rank_N[:, None], rank_M[None])


def _whitening(own_NVV: Float[Array, "N V V"]) -> tuple[Float[Array, "N V V"], Int[Array, " N"]]:
    variance_NV, basis_NVA = jnp.linalg.eigh(own_NVV)
    kept_NV = (variance_NV > _RANK * variance_NV[:, -1:]) & (variance_NV > 0)
    scale_NV = jnp.where(kept_NV, 1 / jnp.sqrt(jnp.where(kept_NV, variance_NV, 1)), 0)
    return basis_NVA * scale_NV[:, None, :], kept_NV.sum(axis=1)
