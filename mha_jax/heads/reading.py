"""The maps of a model, batch by batch, and what `roles` and `shapes` find in them."""

import dataclasses
import functools
import string
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mha_jax.attention import Rule
from mha_jax.attention.statistics import attention_weights
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.heads.capture import Batch, attentions, kind_of, real_queries, watch
from mha_jax.heads.intervals import Estimate, mean_interval
from mha_jax.heads.roles import CROSS, REPEATED, SELF, RoleSums, RoleTable, Tokens, joined, role_sums
from mha_jax.heads.shapes import map_shapes
from mha_jax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class TokenKinds:
    """Facts of every id of a vocabulary, [C] each. `counts` is how often it stands in the training texts."""

    special: np.ndarray
    punctuation: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, counts: np.ndarray) -> "TokenKinds":
        special, punctuation = np.zeros((2, tokenizer.vocab_size), bool)
        special[list(tokenizer.specials)] = True
        texts = [tokenizer.decode([i]).strip() for i in range(tokenizer.vocab_size)]
        punctuation[:] = [bool(text) and all(c in string.punctuation for c in text) for text in texts]
        return cls(special, punctuation & ~special, counts)


class Looking(NamedTuple):
    """Queries and keys of one attention at work, and which keys a query sees."""

    q_BTHK: Array
    k_BSGK: Array
    visibility: Rule


Sums = dict[str, RoleSums]
Shapes = dict[str, tuple[Any, Any]]


class Found(NamedTuple):
    """Roles of one attention's heads, and of self-attention the share of examples with each shape, {shape: [H]}.

    `even` are the shares of shapes of attention that is even over what is seen.
    """

    roles: RoleTable
    shapes: Estimate | None
    even: np.ndarray | None
    examples: int


def head_roles(
    model: Model,
    batches: Iterable[Batch],
    kinds: Mapping[str, TokenKinds],
    repeated: Batch | None = None,
    limit: int | None = None,
) -> dict[str, Found]:
    """Roles and shapes of every attention's heads over all examples of the batches, at most `limit`.

    Texts are read as they are: what a masked language model's batch hides is put back (Clark et al. 2019, section 3).

    Args:   kinds: {"encoder" or "decoder": of that stack's tokens}. repeated: a batch of `repeated_tokens`.
    Raises: UserError as `watch` does.
    """
    parts, seen = [], 0
    for batch in batches:
        parts.append(jax.device_get(_sums(model, _unhidden(batch), kinds)))
        seen += int((next(iter(parts[-1][0].values())).count > 0).any(axis=(1, 2)).sum()) if parts[-1][0] else 0
        if limit is not None and seen >= limit:
            break
    roles = joined([sums for sums, _ in parts], limit)
    random = joined([jax.device_get(_sums(model, repeated, kinds))[0]]) if repeated is not None else {}
    shapes = [own for _, own in parts]
    # Trees come back in the order of the alphabet.
    return {name: _found(name, roles[name], shapes, random, limit) for name in attentions(model) if name in roles}


def _found(
    name: str,
    sums: RoleSums,
    shapes: list[Shapes],
    random: Sums,
    limit: int | None,
) -> Found:
    roles = CROSS if kind_of(name) == "cross" else SELF
    if kind_of(name) == "cross":
        return Found(RoleTable.of(roles, sums), None, None, len(sums.count))
    if name in random:
        place = roles.index("induction")
        sums, extra = _same_examples(sums, RoleSums(*(x[:, :, place : place + 1] for x in random[name])))
        sums = RoleSums(*(np.concatenate(pair, axis=2) for pair in zip(sums, extra, strict=True)))
        roles = (*roles, REPEATED)
    own, even = (np.concatenate([part[name][i] for part in shapes]) for i in range(2))
    own, even = (x[x.any(axis=(1, 2))][:limit] for x in (own, even))
    return Found(
        RoleTable.of(roles, sums),
        mean_interval(own, np.ones(own.shape)),
        even.mean(axis=0) if len(even) else None,
        len(sums.count),
    )


def _same_examples(sums: RoleSums, other: RoleSums) -> tuple[RoleSums, RoleSums]:
    """Both with as many examples, the shorter one filled with examples in which nothing counts."""
    most = max(len(sums.count), len(other.count))

    def filled(part: RoleSums) -> RoleSums:
        return RoleSums(*(np.pad(x, ((0, most - len(x)), (0, 0), (0, 0))) for x in part))

    return filled(sums), filled(other)


def _unhidden(batch: Batch) -> Batch:
    hides = "lengths" in batch and "targets" in batch and "source" not in batch
    return {**batch, "inputs": batch["targets"]} if hides else dict(batch)


def _sums(model: Model, batch: Batch, kinds: Mapping[str, TokenKinds]) -> tuple[Sums, Shapes]:
    """Of one batch: {attention: RoleSums}, and {self-attention: its shapes and those of even attention, [B, H, 5]}."""
    real, looking = queries_keys(model, batch)
    ids = {stack: np.asarray(batch[_tokens_of(batch, stack)]) for stack in real}
    roles, shapes = {}, {}
    for name, layer in attentions(model).items():
        stack, cross = name.split("/")[0], kind_of(name) == "cross"
        keys = "encoder" if cross else stack
        facts = (table[ids[keys]] for table in (kinds[keys].special, kinds[keys].punctuation, kinds[keys].counts))
        counted_BT = np.asarray(real[stack]) & ~kinds[stack].special[ids[stack]]
        tokens = Tokens(*map(jnp.asarray, (ids[stack], ids[keys], counted_BT, *facts)))
        roles[name], found = _found_in(layer.shape.head_to_group, cross, looking[name], tokens)
        if found is not None:
            shapes[name] = found
    return roles, shapes


@jax.jit
def queries_keys(model: Model, batch: Batch) -> tuple[dict[str, Array], dict[str, Looking]]:
    """Real queries of each stack, and what makes the maps of each attention; these are small, the maps are not."""
    found = watch(model, batch, lambda _, at: Looking(at.q_BTHK, at.k_BSGK, at.visibility))[1]
    return real_queries(model, batch), found


def maps_of(looking: Looking, groups: tuple[int, ...] | None) -> tuple[Array, Array]:
    """The weights of an attention at work, [B, H, T, S], and which keys are visible, [B, 1 or H, T, S]."""
    weights = attention_weights(looking.q_BTHK, looking.k_BSGK, looking.visibility, head_to_group=groups)
    visible = looking.visibility.mask(looking.q_BTHK.shape[1], looking.k_BSGK.shape[1])
    return weights, jnp.broadcast_to(visible, (len(weights), *visible.shape[1:]))


# One program serves all layers of a shape: compiled together they would take as many times as long as there are layers.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _found_in(
    groups: tuple[int, ...] | None, cross: bool, looking: Looking, tokens: Tokens
) -> tuple[RoleSums, tuple[Array, Array] | None]:
    weights, visible = maps_of(looking, groups)
    sums = role_sums(weights, visible, tokens, cross)
    if cross:
        return sums, None
    even = visible / jnp.maximum(visible.sum(axis=3, keepdims=True), 1)
    own, flat = (map_shapes(w, visible, tokens.counted_BT, tokens.special_BS) for w in (weights, even))
    return sums, (own, jnp.broadcast_to(flat, own.shape))


def _tokens_of(batch: Batch, stack: str) -> str:
    return {"encoder": "source", "decoder": "target_inputs"}[stack] if "source" in batch else "inputs"


def repeated_tokens(task: str, kinds: Mapping[str, TokenKinds], rows: int, length: int, seed: int = 0) -> Batch:
    """A batch of random ordinary tokens, each row a sequence and the same again: the standard test of induction.

    A head that copies by induction attends from a token of the second half to what followed it in the first. In
    translation both texts repeat.
    """
    rng = np.random.default_rng(seed)

    def drawn(stack: str) -> np.ndarray:
        ordinary = np.flatnonzero(~kinds[stack].special)
        half = rng.choice(ordinary, (rows, length // 2))
        return np.concatenate([half, half], axis=1).astype(np.int32)

    full_B = np.full(rows, 2 * (length // 2), np.int32)
    ones_BT = np.ones((rows, 2 * (length // 2)), np.float32)
    if task == "lm":
        return {"inputs": drawn("decoder"), "weights": ones_BT}
    if task == "translation":
        source, target = drawn("encoder"), drawn("decoder")
        return {"source": source, "source_lengths": full_B, "target_inputs": target, "weights": ones_BT}
    weights = ones_BT if task == "masked_lm" else ones_BT[:, 0]
    return {"inputs": drawn("encoder"), "lengths": full_B, "weights": weights}
