"""Roles of heads: how far each attends as a role says, how far even attention would, and which role is its own.

Every score but those of `SPREAD` is a mean over queries of how much attention goes to the keys that the role names,
in one of two ways: how often the greatest weight is there (ties shared), or the weight that is there. The same is
computed for attention that is even over the keys that the query sees: the chance level, exact for these very texts.
Queries that are special tokens, that see one key only, or none that the role names, do not count.

argmax  previous, next, same     the position before the query's own, after it, its own
        first                    the first key that is seen, where that is neither of those three
        rare                     the token that training's texts have least often, of those that any head sees
        aligned                  cross-attention: as far along the source as the query is in the target, give or take 1
weight  sink                     start and end tokens
        separator                pieces that are punctuation only
        duplicate                earlier tokens equal to the query's
        induction                tokens that follow an earlier token equal to the query's (Olsson et al. 2022)
        long                     the distance to the query in tokens: a mean, not a share
SPREAD  broad                    entropy over that of even attention, whose chance level is 1
        narrow                   the greatest weight: confidence (Voita et al. 2019, section 4)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mha_jax.heads.intervals import mean_interval

SPREAD = ("broad", "narrow")
SELF = ("previous", "next", "same", "first", "rare", "sink", "separator", "duplicate", "induction", "long", *SPREAD)
CROSS = ("aligned", "first", "rare", "sink", "separator", *SPREAD)
# Scored on random tokens that repeat, where nothing but the repetition tells what follows.
REPEATED = "induction_repeated"
_BY_ARGMAX = ("previous", "next", "same", "first", "rare", "aligned")
# Of a head that has several roles, these are named only where there is no other.
GENERAL = ("broad", "long", "narrow")


class Tokens(NamedTuple):
    """What the queries and keys of maps are.

    `counted` are queries that are asked: real, and no special tokens. `counts` is how often a key's token stands in
    the training texts, `special` and `punctuation` say what it is.
    """

    queries_BT: Int[Array, "B T"]
    keys_BS: Int[Array, "B S"]
    counted_BT: Bool[Array, "B T"]
    special_BS: Bool[Array, "B S"]
    punctuation_BS: Bool[Array, "B S"]
    counts_BS: Int[Array, "B S"]


class RoleSums(NamedTuple):
    """Of each example, head and role, float32 [B, H, R]: sums over queries of scores and of chance, and the queries."""

    score: Array | np.ndarray
    chance: Array | np.ndarray
    count: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """From where on a head has a role: the low end of its score's interval is above it, and above chance.

    positional  of previous, next, same, first: 0.9 (Voita et al. 2019, section 5.1)
    weight      of sink, separator, duplicate, induction: over half of the attention, as Clark et al. 2019 (section 3)
                count heads on a position and on [SEP]
    rare        0.5: the share that Voita et al. 2019 (section 5.3) report for the rare-word head on WMT
    aligned     0.5, our own
    narrow      0.8: every positional head of Voita et al. 2019 is as confident (section 5.1)
    broad       0.9 of the entropy of even attention, our own; it cannot be above its chance level, which is 1
    long        1.25 times the distance that even attention has, our own
    """

    positional: float = 0.9
    weight: float = 0.5
    rare: float = 0.5
    aligned: float = 0.5
    narrow: float = 0.8
    broad: float = 0.9
    long: float = 1.25

    def of(self, role: str) -> float:
        """The threshold of a role; that of "long" is in units of its chance level."""
        if role in ("previous", "next", "same", "first"):
            return self.positional
        return getattr(self, role) if role in ("rare", "aligned", *GENERAL) else self.weight


@dataclasses.dataclass(frozen=True)
class RoleTable:
    """Scores of one attention's heads, {role: [H]}: the mean over queries, its 95 % interval over examples, chance.

    NaN where no query could play the role, as "next" under a causal rule.
    """

    mean: dict[str, np.ndarray]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    chance: dict[str, np.ndarray]

    @classmethod
    def of(cls, roles: Sequence[str], sums: RoleSums) -> "RoleTable":
        """From the sums of all N examples, [N, H, R]."""
        found = mean_interval(sums.score, sums.count)
        chance = mean_interval(sums.chance, sums.count).mean
        columns = ({role: x_HR[:, i] for i, role in enumerate(roles)} for x_HR in (*found, chance))
        return cls(*columns)

    def held(self, thresholds: Thresholds = Thresholds()) -> dict[str, np.ndarray]:
        """{role: bool [H]}: which heads have it. Heads of "induction" have it on texts or on repeated random tokens."""
        held = {}
        for role, low in self.low.items():
            least = thresholds.of(role) * (self.chance[role] if role == "long" else 1)
            above = True if role == "broad" else low > self.chance[role]
            held[role] = (low > least) & above  # False for NaN
        if REPEATED in held:
            held["induction"] = held["induction"] | held.pop(REPEATED)
        return held

    def dominant(self, thresholds: Thresholds = Thresholds()) -> list[str | None]:
        """Each head's role: of those it has, the one most above chance, (score - chance) / (1 - chance).

        broad, long and narrow stand for how a head looks rather than where: they are named where there is no other.
        """
        held = self.held(thresholds)
        heads = len(next(iter(self.mean.values())))
        return [self._one({role for role, has in held.items() if has[head]}, head) for head in range(heads)]

    def nearest(self, but: Sequence[str] = ()) -> tuple[list[str | None], np.ndarray]:
        """The role of where each head looks that is most above chance, held or not, and how far above it is, [H].

        How far is (score - chance) / (1 - chance): 0 at chance, 1 for a head that does nothing else. Where no interval
        is above chance it is 0, and the role None. `but` are roles that do not count.
        """
        names = [name for name in self.mean if name not in (*GENERAL, *but)]
        above_RH = np.stack([np.where(self.low[n] > self.chance[n], self._above(n), 0) for n in names])
        most_H = above_RH.max(axis=0)
        roles = ["induction" if names[r] == REPEATED else names[r] for r in above_RH.argmax(axis=0)]
        return [role if most > 0 else None for role, most in zip(roles, most_H, strict=True)], most_H

    def _one(self, held: set[str], head: int) -> str | None:
        special = sorted(held - {*GENERAL})
        if special:
            return max(special, key=lambda role: self._most_above(role, head))
        return next((role for role in GENERAL if role in held), None)

    def _most_above(self, role: str, head: int) -> float:
        names = ("induction", REPEATED) if role == "induction" and REPEATED in self.mean else (role,)
        return float(np.nanmax([self._above(name)[head] for name in names]))

    def _above(self, name: str) -> np.ndarray:
        return (self.mean[name] - self.chance[name]) / np.maximum(1 - self.chance[name], 1e-9)


def role_sums(
    weights_BHTS: Float[Array, "B H T S"], visible_BhTS: Bool[Array, "B h T S"], tokens: Tokens, cross: bool = False
) -> RoleSums:
    """Scores of the roles of `SELF`, or `CROSS`, summed over the queries of every example.

    Works under `jax.jit`. One example is worked on at a time: memory is that of the maps, and of a map a role.

    Args: visible_BhTS: which keys a query sees, h = 1 where all heads see the same. cross: queries are other texts.
    """
    roles = CROSS if cross else SELF
    return jax.lax.map(lambda one: _example_sums(roles, *one), (weights_BHTS, visible_BhTS, tokens))


def _example_sums(roles: Sequence[str], weights_HTS: Array, visible_hTS: Array, tokens: Tokens) -> RoleSums:
    """Of one example: its tokens have no axis B."""
    heads = len(weights_HTS)
    seen_hT = visible_hTS.sum(axis=2)
    wanted = _wanted(tokens, visible_hTS.any(axis=0))
    named = [role for role in roles if role not in SPREAD]
    wanted_RTS = jnp.stack([wanted[role].astype(jnp.float32) for role in named])
    top_HTS = _share_of_top(weights_HTS, visible_hTS)
    by_top = jnp.array([role in _BY_ARGMAX for role in named])[None, :, None]
    score_HRT = jnp.where(
        by_top, jnp.einsum("hts,rts->hrt", top_HTS, wanted_RTS), jnp.einsum("hts,rts->hrt", weights_HTS, wanted_RTS)
    )
    visible_hTS = visible_hTS.astype(jnp.float32)
    inside_hRT = jnp.einsum("hts,rts->hrt", visible_hTS, wanted_RTS)
    chance_hRT = inside_hRT / jnp.maximum(seen_hT, 1)[:, None]
    counts_hT = tokens.counted_BT[None] & (seen_hT > 1)
    spread = _spread(weights_HTS, seen_hT)
    score_HRT = jnp.concatenate([score_HRT, spread], axis=1)
    even_hRT = jnp.stack([jnp.ones(seen_hT.shape), 1 / jnp.maximum(seen_hT, 1)], axis=1)
    chance_hRT = jnp.concatenate([chance_hRT, even_hRT], axis=1)
    able_hRT = jnp.concatenate([inside_hRT > 0, jnp.ones(even_hRT.shape, bool)], axis=1) & counts_hT[:, None]
    sums = (jnp.where(able_hRT, x, 0).sum(axis=2) for x in (score_HRT, chance_hRT, jnp.ones(able_hRT.shape)))
    return RoleSums(*(jnp.broadcast_to(x, (heads, len(roles))) for x in sums))


def _wanted(tokens: Tokens, visible_TS: Array) -> dict[str, Array]:
    """{role: [T, S]}: the keys that it names for each query; for "long", how far each key is."""
    queries_T1, keys_1S = tokens.queries_BT[:, None], tokens.keys_BS[None]
    t, s = jnp.arange(visible_TS.shape[0])[:, None], jnp.arange(visible_TS.shape[1])[None]
    special_1S = tokens.special_BS[None]
    first = jnp.argmax(visible_TS, axis=1)[:, None]
    words_TS = visible_TS & ~special_1S
    counts_TS = jnp.where(words_TS, tokens.counts_BS[None], jnp.iinfo(jnp.int32).max)
    same_TS = (queries_T1 == keys_1S) & words_TS
    after_same_TS = jnp.pad(same_TS, ((0, 0), (1, 0)))[:, :-1]
    # Positions of both texts from 0 to 1; the last of either is that of its end.
    last_t = jnp.maximum(jnp.max(jnp.where(tokens.counted_BT, jnp.arange(len(visible_TS)), 0)), 1)
    last_s = jnp.max(jnp.where(visible_TS.any(axis=0), jnp.arange(visible_TS.shape[1]), 0))
    return {
        "previous": s == t - 1,
        "next": s == t + 1,
        "same": s == t,
        "first": (s == first) & (abs(first - t) > 1),
        "aligned": abs(s - jnp.rint(t * last_s / last_t)) <= 1,
        "rare": words_TS & (counts_TS == counts_TS.min(axis=1, keepdims=True)),
        "sink": jnp.broadcast_to(special_1S, visible_TS.shape),
        "separator": jnp.broadcast_to(tokens.punctuation_BS[None], visible_TS.shape),
        "duplicate": same_TS & (s < t),
        "induction": after_same_TS & (s < t),
        "long": abs(s - t),
    }


def _share_of_top(weights_HTS: Array, visible_hTS: Array) -> Array:
    """1 at the greatest visible weight of each query, shared where several are equal."""
    seen_HTS = jnp.where(visible_hTS, weights_HTS, -1)
    top_HTS = ((seen_HTS == seen_HTS.max(axis=2, keepdims=True)) & visible_hTS).astype(jnp.float32)
    return top_HTS / jnp.maximum(top_HTS.sum(axis=2, keepdims=True), 1)


def _spread(weights_HTS: Array, seen_hT: Array) -> Array:
    """The two of SPREAD, [H, 2, T]."""
    logs_HTS = jnp.log(jnp.where(weights_HTS > 0, weights_HTS, 1))
    entropy_HT = -(weights_HTS * logs_HTS).sum(axis=2)
    return jnp.stack([entropy_HT / jnp.log(jnp.maximum(seen_hT, 2)), weights_HTS.max(axis=2)], axis=1)


def joined(parts: Sequence[Mapping[str, RoleSums]], limit: int | None = None) -> dict[str, RoleSums]:
    """Sums of several batches, the examples one after the other; those in which nothing counts are left out."""
    found = {}
    for name in parts[0]:
        score, chance, count = (np.concatenate([np.asarray(part[name][i]) for part in parts]) for i in range(3))
        real = np.flatnonzero(count.any(axis=(1, 2)) | (count.shape[1] == 0))[:limit]
        found[name] = RoleSums(score[real], chance[real], count[real])
    return found
