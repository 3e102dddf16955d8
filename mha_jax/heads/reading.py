"""The maps of a model, batch by batch, and what `roles` and `shapes` find in them."""

import dataclasses
import string
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mha_jax.attention.statistics import attention_weights
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.heads.capture import Attended, Batch, kind_of, real_queries, watch
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
    return {name: _found(name, sums, [shapes for _, shapes in parts], random, limit) for name, sums in roles.items()}


def _found(
    name: str,
    sums: RoleSums,
    shapes: list[dict[str, tuple[np.ndarray, np.ndarray]]],
    random: Mapping[str, RoleSums],
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


def _sums(
    model: Model, batch: Batch, kinds: Mapping[str, TokenKinds]
) -> tuple[dict[str, RoleSums], dict[str, tuple[Array, Array]]]:
    tables = {stack: (one.special, one.punctuation, one.counts) for stack, one in kinds.items()}
    return _jit_sums(model, batch, jax.tree.map(jnp.asarray, tables))


@jax.jit
def _jit_sums(
    model: Model, batch: Batch, tables: dict[str, tuple[Array, Array, Array]]
) -> tuple[dict[str, RoleSums], dict[str, tuple[Array, Array]]]:
    real = real_queries(model, batch)
    ids = {stack: batch[_tokens_of(batch, stack)] for stack in real}

    def look(name: str, attended: Attended) -> tuple[RoleSums, tuple[Array, Array] | None]:
        stack, cross = name.split("/")[0], kind_of(name) == "cross"
        keys = "encoder" if cross else stack
        special, punctuation, counts = (table[ids[keys]] for table in tables[keys])
        counted_BT = real[stack] & ~tables[stack][0][ids[stack]]
        tokens = Tokens(ids[stack], ids[keys], counted_BT, special, punctuation, counts)
        weights, visible = maps_of(attended)
        sums = role_sums(weights, visible, tokens, cross)
        if cross:
            return sums, None
        even = visible / jnp.maximum(visible.sum(axis=3, keepdims=True), 1)
        shapes = tuple(map_shapes(w, visible, counted_BT, special) for w in (weights, even))
        return sums, (shapes[0], jnp.broadcast_to(shapes[1], shapes[0].shape))

    found = watch(model, batch, look)[1]
    return {name: sums for name, (sums, _) in found.items()}, {
        name: shapes for name, (_, shapes) in found.items() if shapes is not None
    }


def _tokens_of(batch: Batch, stack: str) -> str:
    return {"encoder": "source", "decoder": "target_inputs"}[stack] if "source" in batch else "inputs"


def maps_of(attended: Attended) -> tuple[Array, Array]:
    """The weights of an attention at work, [B, H, T, S], and which keys are visible, [B, 1 or H, T, S]."""
    layer, q_BTHK, k_BSGK, _, visibility, _ = attended
    weights = attention_weights(q_BTHK, k_BSGK, visibility, head_to_group=layer.shape.head_to_group)
    visible = visibility.mask(q_BTHK.shape[1], k_BSGK.shape[1])
    return weights, jnp.broadcast_to(visible, (len(weights), *visible.shape[1:]))


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
