"""The four models: a language model, a masked one, a translator and a classifier, each of stacks and a token table."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mha_jax.attention.dropout import dropout
from mha_jax.attention.gates import make_gate
from mha_jax.attention.visibility import Causal, Padding, Segments
from mha_jax.models.blocks import Keys, Stack, fold
from mha_jax.models.cost import matched_d_ff
from mha_jax.models.feed_forward import ACTIVATIONS, linear, make_norm, normed, param_dtype
from mha_jax.models.tokens import TokenTable, token_table
from mha_jax.specs import ModelSpec, RunSpec


class LanguageModel(nnx.Module):
    """Predicts each next token from those before it.

    With `segments` a token sees only earlier tokens of its own segment; positions count on through the row.
    """

    def __init__(self, run: RunSpec, *, rngs: nnx.Rngs) -> None:
        self.tokens = token_table(run, rngs)
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


class MaskedHead(nnx.Module):
    """What stands between the encoder and the logits of a masked language model (Devlin et al. 2019, appendix A.1).

      y[b,t] = Norm(activation(dense(x[b,t]))),   logits[b,t,c] = <y[b,t], embedding[c]> + bias[c]

    The activation is that of the feed-forward layers, silu where they are gated.
    """

    def __init__(self, spec: ModelSpec, num_tokens: int, *, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[spec.activation]
        self.dense = linear(spec, spec.d_model, spec.d_model, rngs=rngs)
        self.norm = make_norm(spec, rngs)
        self.bias = nnx.Param(jnp.zeros(num_tokens, param_dtype(spec)))

    def __call__(self, x_BTD: Float[Array, "B T D"], tokens: TokenTable) -> Float[Array, "B T C"]:
        y_BTD = normed(self.norm, self.activation(self.dense(x_BTD)))
        return tokens.logits(y_BTD) + self.bias[...][None, None, :]


class MaskedLanguageModel(nnx.Module):
    """Predicts tokens from those on both sides of them (Devlin et al. 2019, section 3.1, task 1)."""

    def __init__(self, run: RunSpec, *, rngs: nnx.Rngs) -> None:
        self.tokens = token_table(run, rngs)
        self.encoder = Stack(run.model, "encoder", matched_d_ff(run), rngs=rngs)
        self.head = MaskedHead(run.model, run.data.tokens, rngs=rngs)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        lengths_B: Int[Array, " B"],
        *,
        types: Int[Array, "B T"] | None = None,
        dropout_keys: Keys = None,
    ) -> Float[Array, "B T C"]:
        """Logits of the token at each position, masked or not; dropout only where `dropout_keys` are given."""
        x_BTD = self.tokens.embed(tokens_BT, types)
        return self.head(self.encoder(x_BTD, Padding(lengths_B), dropout_keys=dropout_keys), self.tokens)


class TranslationModel(nnx.Module):
    """Encoder and decoder sharing one token table (Vaswani et al. 2017, figure 1)."""

    def __init__(self, run: RunSpec, *, rngs: nnx.Rngs) -> None:
        self.tokens = token_table(run, rngs)
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
    """An encoder, one vector a row, and a linear layer.

    pooling "mean": the vector is the mean over a row's real positions. "first": tanh(pooler(x[b,0])), with dropout, as
    BERT reads its [CLS] (Devlin et al. 2019, section 3).
    """

    def __init__(self, run: RunSpec, *, rngs: nnx.Rngs) -> None:
        assert run.data.num_classes is not None  # RunSpec has refused it
        self.tokens = token_table(run, rngs)
        self.encoder = Stack(run.model, "encoder", matched_d_ff(run), rngs=rngs)
        self.dropout_rate, self.num_layers = run.model.dropout_rate, run.model.num_layers
        pooled = run.model.pooling == "first"
        self.pooler = linear(run.model, run.model.d_model, run.model.d_model, rngs=rngs) if pooled else None
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
        self,
        tokens_BT: Int[Array, "B T"],
        lengths_B: Int[Array, " B"],
        *,
        types: Int[Array, "B T"] | None = None,
        dropout_keys: Keys = None,
    ) -> Float[Array, "B C"]:
        """Logits of the classes; a row of length 0 has those of the zero vector."""
        x_BTD = self.encoder(self.tokens.embed(tokens_BT, types), Padding(lengths_B), dropout_keys=dropout_keys)
        real_BT = jnp.arange(tokens_BT.shape[1])[None, :] < lengths_B[:, None]
        # where, not a product: a NaN beyond the end must not reach the mean.
        kept_BTD = jnp.where(real_BT[:, :, None], x_BTD, 0).astype(self.classes.param_dtype)
        if self.pooler is None:
            return self.classes(kept_BTD.sum(axis=1) / jnp.maximum(lengths_B, 1)[:, None])
        first_BD = jnp.tanh(self.pooler(kept_BTD[:, 0]))
        keys = fold(dropout_keys, self.num_layers + 1)  # the encoder folds 0 to num_layers into the same keys
        return self.classes(first_BD if keys is None else dropout(first_BD, keys, self.dropout_rate))


Model = LanguageModel | MaskedLanguageModel | TranslationModel | Classifier


def build_model(run: RunSpec, *, rngs: nnx.Rngs) -> Model:
    """The model that a run trains, freshly initialised.

    Parameters are float32 (float64 for model.dtype="float64"); model.dtype is what the layers compute in.
    """
    models = {
        "lm": LanguageModel,
        "masked_lm": MaskedLanguageModel,
        "translation": TranslationModel,
        "classification": Classifier,
    }
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
