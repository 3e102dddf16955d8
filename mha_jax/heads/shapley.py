"""The Shapley value of heads: what each adds to the model, averaged over every order in which heads could be added.

  phi[h] = mean over orders of  v(heads before h, and h) - v(heads before h)      (Shapley 1953)

v(S) is minus the loss, in nats a target, with the heads in S at their gates and the others at 0. So the values sum to
what all heads together are worth: loss without any minus loss with all.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mha_jax.heads.capture import Batch, attentions, chosen_layers
from mha_jax.heads.prefix import run_prefix, with_gates
from mha_jax.heads.tables import HeadTable
from mha_jax.models.losses import example_sums
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError
from mha_jax.specs.checks import at_least

# 2^12 coalitions of one layer: some minutes a batch for a small model on a CPU.
MOST_EXACT = 12
# Coalitions, bool [N, P], to their values, float64 [N].
Value = Callable[[np.ndarray], np.ndarray]


def exact_values(value: Value, players: int) -> np.ndarray:
    """Shapley values [P] from all 2^P coalitions.

      phi[p] = sum over S without p of |S|! (P - |S| - 1)! / P! * (v(S and p) - v(S))

    Raises: UserError for more than `MOST_EXACT` players.
    """
    if players > MOST_EXACT:
        raise UserError(
            f"exact Shapley values of {players} heads need 2^{players} coalitions; at most {MOST_EXACT} heads are "
            "computed exactly, more are sampled by permutations"
        )
    numbers = np.arange(2**players)
    members = (numbers[:, None] >> np.arange(players)[None]) & 1 == 1
    values, sizes = value(members), members.sum(axis=1)
    # One in P * C(P - 1, |S|): every order that starts with S, then p.
    share = np.array([1 / (players * _choose(players - 1, size)) for size in range(players)])
    found = np.zeros(players)
    for p in range(players):
        without = numbers[~members[:, p]]
        found[p] = np.sum(share[sizes[without]] * (values[without | 1 << p] - values[without]))
    return found


def sampled_values(value: Value, players: int, permutations: int, rng: np.random.Generator) -> np.ndarray:
    """What each player adds in each of M random orders, [M, P]; the mean over M estimates its Shapley value.

    Every row sums to v(all) - v(none). The standard error is that of a mean of M independent rows. (Castro et al. 2009)
    """
    at_least("permutations", permutations, 1)
    orders = np.stack([rng.permutation(players) for _ in range(permutations)])
    ranks = np.argsort(orders, axis=1)
    inner = ranks[:, None, :] < np.arange(1, players)[None, :, None]  # [M, P - 1, P]: the first 1 .. P - 1 of an order
    ends = np.stack([np.zeros(players, bool), np.ones(players, bool)])
    values = value(np.concatenate([ends, inner.reshape(-1, players)]))
    between = values[2:].reshape(permutations, -1)
    none, every = (np.full((permutations, 1), end) for end in values[:2])
    added = np.diff(np.concatenate([none, between, every], axis=1)[:, : players + 1], axis=1)
    return np.take_along_axis(added, ranks, axis=1)


def layer_shapley(
    task: str,
    model: Model,
    batches: Sequence[Batch],
    *,
    names: Sequence[str] | None = None,
    permutations: int | None = None,
    seed: int = 0,
) -> HeadTable:
    """Shapley values of the heads of each attention named (default: all), all other attentions whole, by batch.

    Args:   permutations: random orders a batch, fresh in each, so that the standard error over batches is of both;
              None: exact.
    Raises: UserError for an attention that does not exist, one with too many heads to be exact, under two batches.
    """
    names = chosen_layers(model, names)
    heads = {name: attentions(model)[name].shape.num_heads for name in names}
    rows, weights = [], []
    for number, batch in enumerate(batches):
        prefix, rng = run_prefix(task, model, batch), np.random.default_rng((seed, number))
        weights.append(float(prefix.sums["weight"].sum()))
        row = {}
        for name in names:
            value = functools.partial(_value, functools.partial(prefix.ablate, name), weights[-1])
            row[name] = _shapley(value, heads[name], permutations, rng)
        rows.append(row)
    return HeadTable({name: np.stack([row[name] for row in rows]) for name in names if rows}, np.array(weights))


def model_shapley(task: str, model: Model, batches: Sequence[Batch], *, permutations: int, seed: int = 0) -> HeadTable:
    """Shapley values of all heads of the model as players of one game, sampled by random orders, by batch.

    A batch takes about `permutations` times the number of heads passes through the whole model, each batch in fresh
    orders, so that the standard error over batches is of both.

    Raises: UserError for fewer than one permutation or two batches.
    """
    sizes = {name: layer.shape.num_heads for name, layer in attentions(model).items()}
    ends = np.cumsum(list(sizes.values()))

    def split(of_all: Any) -> dict[str, Any]:
        return {name: of_all[..., end - size : end] for (name, size), end in zip(sizes.items(), ends, strict=True)}

    rows, weights = [], []
    for number, batch in enumerate(batches):
        weights.append(float(batch["weights"].sum()))
        sums = functools.partial(_gated, task, model, batch)
        value = functools.partial(_value, lambda members_NP, sums=sums: sums(split(members_NP)), weights[-1])
        rng = np.random.default_rng((seed, number))
        rows.append(split(_shapley(value, sum(sizes.values()), permutations, rng)))
    return HeadTable({name: np.stack([row[name] for row in rows]) for name in sizes if rows}, np.array(weights))


def _shapley(value: Value, players: int, permutations: int | None, rng: np.random.Generator) -> np.ndarray:
    if players == 0:
        return np.zeros(0)
    if permutations is None:
        return exact_values(value, players)
    return sampled_values(value, players, permutations, rng).mean(axis=0)


def _value(sums: Callable[[Array], dict[str, Array]], weight: float, members_NP: np.ndarray) -> np.ndarray:
    """Minus the loss a target, [N], with gates 1 for the members."""
    loss_NB = np.asarray(sums(jnp.asarray(members_NP, jnp.float32))["loss"], np.float64)
    return -loss_NB.sum(axis=1) / max(weight, 1)


@functools.partial(jax.jit, static_argnums=0)
def _gated(task: str, model: Model, batch: Batch, gates: dict[str, Array]) -> dict[str, Array]:
    """Sums of every example, [N, B] each, by the whole model with each set of gates {attention: [N, H]}."""
    return jax.lax.map(lambda own: example_sums(task, with_gates(model, own), batch), gates)


def _choose(n: int, k: int) -> float:
    return float(np.prod([(n - i) / (i + 1) for i in range(k)]))
