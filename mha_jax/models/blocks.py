"""One Transformer block, and a stack of them with heads of its own in every layer."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mha_jax.attention.dropout import dropout
from mha_jax.attention.multihead import MultiHeadAttention
from mha_jax.attention.routing import Route, note_routes, routes
from mha_jax.attention.visibility import Full, Rule
from mha_jax.models.feed_forward import FeedForward, Norm, make_norm, normed, param_dtype
from mha_jax.models.positions import Positions, embedding_scale
from mha_jax.specs import HeadShape, ModelSpec, SpanSpec

Keys = Key[Array, " B"] | None
# What blocks read beside x: the rule of self-attention, a memory, and the rule of attention to it.
Context = tuple[Rule, Float[Array, "B S D"] | None, Rule | None]

# What a block keeps for its backward pass: products of activations with weights, or nothing but its input.
_SAVED = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


def fold(keys: Keys, number: int | Int[Array, ""]) -> Keys:
    """Keys for one use of randomness: the same wherever the example is computed, and None for evaluation."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _attention(spec: ModelSpec, shape: HeadShape, *, own: bool, rngs: nnx.Rngs) -> MultiHeadAttention:
    return MultiHeadAttention(
        spec.d_model,
        shape.num_heads,
        shape.num_kv_heads,
        shape.qk_dim,
        shape.v_dim,
        head_to_group=shape.head_to_group,
        use_bias=spec.use_bias,
        dropout_rate=spec.attention_dropout_rate,
        rope=own and spec.positions == "rope",
        rope_base=spec.rope_base,
        routing=spec.routing,
        adaptive_span=spec.adaptive_span if own else SpanSpec(),
        init=spec.init,
        dtype=jnp.dtype(spec.dtype),
        param_dtype=param_dtype(spec),
        backend=spec.backend,
        rngs=rngs,
    )


class Block(nnx.Module):
    """Self-attention, cross-attention where there is a memory, and a feed-forward layer.

      norm "post": y = Norm(x + dropout(f(x)))     (Vaswani et al. 2017, section 3.1)
      norm "pre":  y = x + dropout(f(Norm(x)))     for each f of the three

    Norm is a LayerNorm, or with normalization="rms" one that neither centres nor shifts (Zhang and Sennrich 2019).

    Whoever computes attention in another way (the cached step of decoding) uses `before` and `after` around it.
    """

    def __init__(self, spec: ModelSpec, own: HeadShape, cross: HeadShape | None, d_ff: int, *, rngs: nnx.Rngs) -> None:
        self.norm, self.dropout_rate = spec.norm, spec.dropout_rate
        self.attention = _attention(spec, own, own=True, rngs=rngs)
        self.attention_norm = make_norm(spec, rngs)
        if cross is not None:
            self.cross_attention = _attention(spec, cross, own=False, rngs=rngs)
            self.cross_attention_norm = make_norm(spec, rngs)
        self.feed_forward = FeedForward(spec, d_ff, rngs=rngs)
        self.feed_forward_norm = make_norm(spec, rngs)

    def before(self, x_BTD: Float[Array, "B T D"], norm: Norm) -> Float[Array, "B T D"]:
        """What the sublayer reads."""
        return normed(norm, x_BTD) if self.norm == "pre" else x_BTD

    def after(
        self, x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"], norm: Norm, keys: Keys = None
    ) -> Float[Array, "B T D"]:
        """The residual stream with what the sublayer wrote."""
        if keys is not None:
            y_BTD = dropout(y_BTD, keys, self.dropout_rate)
        x_BTD = x_BTD + y_BTD.astype(x_BTD.dtype)
        if self.norm == "pre":
            return x_BTD
        # Right behind dropout the norm stays as it is: as rows, each of its passes would draw dropout's bits anew.
        return normed(norm, x_BTD) if keys is None else norm(x_BTD).astype(x_BTD.dtype)

    def attend(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Rule,
        memory_BSD: Float[Array, "B S D"] | None = None,
        memory_visibility: Rule | None = None,
        *,
        dropout_keys: Keys = None,
    ) -> Float[Array, "B T D"]:
        """The attention sublayers with their residuals."""
        y_BTD = self.before(x_BTD, self.attention_norm)
        y_BTD = self.attention(y_BTD, visibility=visibility, dropout_key=fold(dropout_keys, 0))
        x_BTD = self.after(x_BTD, y_BTD, self.attention_norm, fold(dropout_keys, 1))
        if memory_BSD is not None:
            y_BTD = self.before(x_BTD, self.cross_attention_norm)
            rule = Full() if memory_visibility is None else memory_visibility
            y_BTD = self.cross_attention(y_BTD, memory_BSD, visibility=rule, dropout_key=fold(dropout_keys, 2))
            x_BTD = self.after(x_BTD, y_BTD, self.cross_attention_norm, fold(dropout_keys, 3))
        return x_BTD

    def feed(self, x_BTD: Float[Array, "B T D"], dropout_keys: Keys = None) -> Float[Array, "B T D"]:
        """The feed-forward sublayer with its residual."""
        y_BTD = self.feed_forward(self.before(x_BTD, self.feed_forward_norm))
        return self.after(x_BTD, y_BTD, self.feed_forward_norm, fold(dropout_keys, 4))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Rule,
        memory_BSD: Float[Array, "B S D"] | None = None,
        memory_visibility: Rule | None = None,
        *,
        dropout_keys: Keys = None,
    ) -> Float[Array, "B T D"]:
        x_BTD = self.attend(x_BTD, visibility, memory_BSD, memory_visibility, dropout_keys=dropout_keys)
        return self.feed(x_BTD, dropout_keys)


def _run_block(
    block: Any, x_BTD: Array, context: Context, dropout_keys: Keys, *, remat: str, in_scan: bool = False
) -> Array:
    """One block, with what its backward pass needs saved or computed again as `remat` says."""

    # The context is closed over, so that arrays of a rule that are known while tracing stay known.
    def attend(block: Any, x_BTD: Array, keys: Keys) -> tuple[Array, list[Route]]:
        with routes() as found:
            return block.attend(x_BTD, *context, dropout_keys=keys), found

    def whole(block: Any, x_BTD: Array, keys: Keys) -> tuple[Array, list[Route]]:
        with routes() as found:
            return block(x_BTD, *context, dropout_keys=keys), found

    # A scan's backward pass is a loop of its own: nothing there can be merged with the forward pass.
    prevent_cse = not in_scan
    if remat == "none":
        return block(x_BTD, *context, dropout_keys=dropout_keys)
    if remat == "attention":
        x_BTD, found = jax.checkpoint(attend, prevent_cse=prevent_cse)(block, x_BTD, dropout_keys)
        x_BTD = block.feed(x_BTD, dropout_keys)
    else:
        run = jax.checkpoint(whole, prevent_cse=prevent_cse, policy=_SAVED[remat])
        x_BTD, found = run(block, x_BTD, dropout_keys)
    note_routes(found)
    return x_BTD


def _run_equal(
    blocks: Sequence[Block], numbers_L: Array, x_BTD: Array, context: Context, dropout_keys: Keys, *, remat: str
) -> Array:
    """Blocks of one structure as one scan over their stacked parameters; `numbers_L` tell their dropout apart."""

    def step(x_BTD: Array, layer: tuple[Block, Array]) -> tuple[Array, list[Route]]:
        block, number = layer
        with routes() as found:
            return _run_block(block, x_BTD, context, fold(dropout_keys, number), remat=remat, in_scan=True), found

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    x_BTD, found = lax.scan(step, x_BTD, (stacked, numbers_L))
    for layer in range(len(blocks)):
        note_routes(jax.tree.map(lambda leaf_L, layer=layer: leaf_L[layer], found))
    return x_BTD


class Stack(nnx.Module):
    """L blocks over embedded tokens: positions, a norm with `embedding_norm`, dropout; and with pre-norm a norm last.

    With layers="scan" neighbours of one structure (same heads, same widths) run as one `lax.scan`. Each layer still
    holds its own parameters, stacked only while the step runs: a checkpoint does not tell how its layers were run.

    Args: kind: whose heads `spec.heads` gives to self-attention. cross: whether the blocks read a memory.
    """

    def __init__(self, spec: ModelSpec, kind: str, d_ff: int, *, cross: bool = False, rngs: nnx.Rngs) -> None:
        self.dropout_rate, self.dtype = spec.dropout_rate, jnp.dtype(spec.dtype)
        self.layers, self.remat = spec.layers, spec.remat
        self.positions = Positions(
            spec.positions,
            spec.max_length,
            spec.d_model,
            embedding_scale(spec),
            param_dtype=param_dtype(spec),
            rngs=rngs,
        )
        crosses = spec.heads("cross") if cross else (None,) * spec.num_layers
        self.blocks = nnx.List(
            [Block(spec, own, other, d_ff, rngs=rngs) for own, other in zip(spec.heads(kind), crosses, strict=True)]
        )
        self.final_norm = make_norm(spec, rngs) if spec.norm == "pre" else None
        self.embedding_norm = make_norm(spec, rngs) if spec.embedding_norm else None

    def enter(
        self, x_BTD: Float[Array, "B T D"], positions_T: Int[Array, " T"], keys: Keys = None
    ) -> Float[Array, "B T D"]:
        """Embedded tokens as the first block reads them."""
        x_BTD = self.positions(x_BTD, positions_T)
        if self.embedding_norm is not None:
            x_BTD = normed(self.embedding_norm, x_BTD)
        return x_BTD if keys is None else dropout(x_BTD, keys, self.dropout_rate)

    def leave(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the stack hands on after the last block."""
        return x_BTD if self.final_norm is None else normed(self.final_norm, x_BTD)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Rule,
        memory_BSD: Float[Array, "B S D"] | None = None,
        memory_visibility: Rule | None = None,
        *,
        dropout_keys: Keys = None,
    ) -> Float[Array, "B T D"]:
        x_BTD = self.enter(x_BTD, jnp.arange(x_BTD.shape[1]), fold(dropout_keys, 0))
        context, layer = (visibility, memory_BSD, memory_visibility), 1
        for blocks in self._runs():
            if len(blocks) > 1:
                numbers_L = jnp.arange(layer, layer + len(blocks))
                x_BTD = _run_equal(blocks, numbers_L, x_BTD, context, dropout_keys, remat=self.remat)
            else:
                x_BTD = _run_block(blocks[0], x_BTD, context, fold(dropout_keys, layer), remat=self.remat)
            layer += len(blocks)
        return self.leave(x_BTD)

    def _runs(self) -> list[list[Any]]:
        """The blocks, or whatever watches in their place, in order; in one list those that one scan runs."""
        if self.layers == "unrolled":
            return [[block] for block in self.blocks]
        return [list(equal) for _, equal in itertools.groupby(self.blocks, jax.tree.structure)]
