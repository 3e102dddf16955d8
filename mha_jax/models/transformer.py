"""The three models: a language model, a translator and a classifier, each a few stacks around one token table."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from mha_jax.attention.gates import make_gate
from mha_jax.attention.visibility import Causal, Padding, Segments
from mha_jax.models.blocks import Keys, Stack, fold, param_dtype
from mha_jax.models.cost import matched_d_ff
from mha_jax.specs import RunSpec


class TokenTable(nnx.Module):
    """One vector a token, read on the way in and on the way out (Vaswani et al. 2017, section 3.4).

      x[b,t] = scale * embedding[token[b,t]],   logits[b,t,c] = <y[b,t], embedding[c]>

    The embedding starts normal with deviation D**-0.5: with scale = sqrt(D), x and the logits have unit variance.
    """

    def __init__(
        self, num_tokens: int, d_model: int, scale: float, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.d_model, self.scale, self.dtype, self.param_dtype = d_model, scale, dtype, param_dtype
        draw = jax.random.normal(rngs.params(), (num_tokens, d_model), param_dtype)
        self.embedding = nnx.Param(draw * d_model**-0.5)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Vectors of tokens, in the compute dtype."""
        return (self.embedding[...][tokens_BT] * self.scale).astype(self.dtype)

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
        """Scores of every token, accumulated and returned in the parameters' dtype."""
        table_CD = self.embedding[...].astype(self.dtype)
        rows = x_BTD.reshape(-1, self.d_model)
        logits = jnp.einsum("ND,CD->NC", rows, table_CD, preferred_element_type=self.param_dtype)
        return logits.reshape(*x_BTD.shape[:2], -1)


def _token_table(run: RunSpec, rngs: nnx.Rngs) -> TokenTable:
    return TokenTable(
        run.data.tokens,
        run.model.d_model,
        run.model.d_model**0.5 if run.model.scale_embedding else 1.0,
        dtype=jnp.dtype(run.model.dtype),
        param_dtype=param_dtype(run.model),
        rngs=rngs,
    )


class LanguageModel(nnx.Module):
    """Predicts each next token from those before it.

    With `segments` a token sees only earlier tokens of its own segment; positions count on through the row.
    """

    def __init__(self, run: RunSpec, *, rngs: nnx.Rngs) -> None:
        self.tokens = _token_table(run, rngs)
        self.decoder = Stack(run.model, "decoder", matched_d_ff(run), rngs=rngs)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        dropout_keys: Keys = None,
    ) -> Float[Array, "B T C"]:
        """Logits of the token after each; dropout only where `dropout_keys`, one an example, are given."""
        visibility = Causal() if segments is None else Causal() & Segments(segments)
        return self.tokens.logits(self.decoder(self.tokens.embed(tokens_BT), visibility, dropout_keys=dropout_keys))


class TranslationModel(nnx.Module):
    """Encoder and decoder sharing one token table (Vaswani et al. 2017, figure 1)."""

    def __init__(self, run: RunSpec, *, rngs: nnx.Rngs) -> None:
        self.tokens = _token_table(run, rngs)
        self.encoder = Stack(run.model, "encoder", matched_d_ff(run), rngs=rngs)
        self.decoder = Stack(run.model, "decoder", matched_d_ff(run), cross=True, rngs=rngs)

    def encode(
        self, source_BS: Int[Array, "B S"], lengths_B: Int[Array, " B"], dropout_keys: Keys = None
    ) -> Float[Array, "B S D"]:
        """The memory: one vector a source token. Positions beyond a row's length hold values that nobody may read."""
        return self.encoder(self.tokens.embed(source_BS), Padding(lengths_B), dropout_keys=fold(dropout_keys, 0))

    def decode(
        self,
        target_BT: Int[Array, "B T"],
        memory_BSD: Float[Array, "B S D"],
        lengths_B: Int[Array, " B"],
        dropout_keys: Keys = None,
    ) -> Float[Array, "B T C"]:
        """Logits of the target token after each of `target_BT`, which starts with BOS."""
        x_BTD = self.decoder(
            self.tokens.embed(target_BT),
            Causal(),
            memory_BSD,
            Padding(lengths_B),
            dropout_keys=fold(dropout_keys, 1),
        )
        return self.tokens.logits(x_BTD)

    def __call__(
        self,
        source_BS: Int[Array, "B S"],
        source_lengths_B: Int[Array, " B"],
        target_BT: Int[Array, "B T"],
        *,
        dropout_keys: Keys = None,
    ) -> Float[Array, "B T C"]:
        """Logits of the target token after each; dropout only where `dropout_keys`, one an example, are given."""
        memory_BSD = self.encode(source_BS, source_lengths_B, dropout_keys)
        return self.decode(target_BT, memory_BSD, source_lengths_B, dropout_keys)


class Classifier(nnx.Module):
    """An encoder, the mean over a row's real positions, and one linear layer."""

    def __init__(self, run: RunSpec, *, rngs: nnx.Rngs) -> None:
        assert run.data.num_classes is not None  # RunSpec has refused it
        self.tokens = _token_table(run, rngs)
        self.encoder = Stack(run.model, "encoder", matched_d_ff(run), rngs=rngs)
        dtype = param_dtype(run.model)
        self.classes = nnx.Linear(
            run.model.d_model,
            run.data.num_classes,
            dtype=dtype,
            param_dtype=dtype,
            kernel_init=nnx.initializers.glorot_uniform(),
            rngs=rngs,
        )

    def __call__(
        self, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"], *, dropout_keys: Keys = None
    ) -> Float[Array, "B C"]:
        """Logits of the classes; a row of length 0 has those of the zero vector."""
        x_BTD = self.encoder(self.tokens.embed(tokens_BT), Padding(lengths_B), dropout_keys=dropout_keys)
        real_BT = jnp.arange(tokens_BT.shape[1])[None, :] < lengths_B[:, None]
        # where, not a product: a NaN beyond the end must not reach the mean.
        kept_BTD = jnp.where(real_BT[:, :, None], x_BTD, 0).astype(self.classes.param_dtype)
        return self.classes(kept_BTD.sum(axis=1) / jnp.maximum(lengths_B, 1)[:, None])


Model = LanguageModel | TranslationModel | Classifier


def build_model(run: RunSpec, *, rngs: nnx.Rngs) -> Model:
    """The model that a run trains, freshly initialised.

    Parameters are float32 (float64 for model.dtype="float64"); model.dtype is what the layers compute in.
    """
    models = {"lm": LanguageModel, "translation": TranslationModel, "classification": Classifier}
    model = models[run.task](run, rngs=rngs)
    if run.gates.kind != "none":
        _put_in_gates(run, run.gates.kind, model)
    return model


def _put_in_gates(run: RunSpec, kind: Literal["scalar", "hard_concrete"], model: Model) -> None:
    for stack in ("encoder", "decoder"):
        for block in getattr(model, stack).blocks if hasattr(model, stack) else ():
            for gated, place in ((stack, "attention"), ("cross", "cross_attention")):
                if gated in run.gated_kinds and hasattr(block, place):
                    layer = getattr(block, place)
                    initial, dtype = run.gates.initial_log_alpha, param_dtype(run.model)
                    layer.learned_gate = make_gate(kind, layer.shape.num_heads, initial, dtype)
