"""The four models: a language model, a masked one, a translator and a classifier, each of stacks and a token table."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from mha_jax.attention.dropout import dropout
from mha_jax.attention.gates import make_gate
from mha_jax.attention.target import target
from mha_jax.attention.visibility import Causal, Padding, Segments
from mha_jax.models.blocks import Keys, Stack, fold
from mha_jax.models.cost import matched_d_ff
from mha_jax.models.feed_forward import ACTIVATIONS, linear, make_norm, normed, param_dtype
from mha_jax.models.positions import embedding_scale
from mha_jax.specs import ModelSpec, RunSpec, UserError


class TokenTable(nnx.Module):
    """One vector a token, read on the way in and on the way out (Vaswani et al. 2017, section 3.4).

      x[b,t] = scale * (embedding[token[b,t]] + type_embedding[type[b,t]]),   logits[b,t,c] = <y[b,t], embedding[c]>

    The embeddings start normal with deviation D**-0.5: with scale = sqrt(D), x and the logits have unit variance. That
    of types (the segments of Devlin et al. 2019, section 3) is there with `num_types`. Without `tied_output` the logits
    are products with `output` [C, D], a table of its own.
    """

    def __init__(
        self,
        num_tokens: int,
        num_types: int,
        d_model: int,
        scale: float,
        *,
        tied_output: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.d_model, self.scale, self.dtype, self.param_dtype = d_model, scale, dtype, param_dtype
        key = rngs.params()

        def table(key: Array, rows: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(key, (rows, d_model), param_dtype) * d_model**-0.5)

        self.embedding = table(key, num_tokens)
        # A key folded out of the same one: types do not shift what later layers draw.
        self.type_embedding = table(jax.random.fold_in(key, 1), num_types) if num_types else None
        self.output = None if tied_output else table(jax.random.fold_in(key, 2), num_tokens)

    def embed(self, tokens_BT: Int[Array, "B T"], types_BT: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Vectors of tokens, in the compute dtype; a token whose type is not given has type 0.

        Raises: UserError for types where the model has none.
        """
        x_BTD = self.embedding[...][tokens_BT]
        if self.type_embedding is not None:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD = x_BTD + self.type_embedding[...][types_BT]
        elif types_BT is not None:
            raise UserError("types of tokens are given, but model.token_types=0")
        return (x_BTD * self.scale).astype(self.dtype)

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
        """Scores of every token, accumulated and returned in the parameters' dtype."""
        table_CD = (self.embedding if self.output is None else self.output)[...].astype(self.dtype)
        rows = x_BTD.reshape(-1, self.d_model)
        if rows.dtype == self.param_dtype:
            logits = jnp.einsum("ND,CD->NC", rows, table_CD)
        else:
            logits = jnp.asarray(_wide_scores(jnp.dtype(self.param_dtype), rows, table_CD))
        return logits.reshape(*x_BTD.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_scores(wide: Any, x_ND: Array, table_CD: Array) -> Float[Array, "N C"]:
    """x @ table.T, summed and returned in the wide type.

    The slopes of the scores are rounded to the narrow type, as every other layer's are: left wide, both products of the
    backward pass would be of wide numbers, at half the speed or less of narrow ones on an accelerator. Odd numbers of
    tokens cost as much there, so the table is filled up.
    """
    scores_NC = jnp.einsum("ND,CD->NC", x_ND, _filled_up(table_CD), preferred_element_type=wide)
    return scores_NC[:, : len(table_CD)]


def _filled_up(table_CD: Array) -> Array:
    """Zeroes below, to a number of rows that matrix units take at their best."""
    return jnp.pad(table_CD, ((0, -len(table_CD) % 128), (0, 0))) if target() != "cpu" else table_CD


def _wide_scores_fwd(wide: Any, x_ND: Array, table_CD: Array) -> Any:
    return _wide_scores(wide, x_ND, table_CD), (x_ND, table_CD)


def _wide_scores_bwd(wide: Any, saved: Any, slopes_NC: Array) -> tuple[Array, Array]:
    x_ND, table_CD = saved
    filled_CD = _filled_up(table_CD)
    slopes_NC = jnp.pad(slopes_NC.astype(x_ND.dtype), ((0, 0), (0, len(filled_CD) - len(table_CD))))
    by_x = jnp.einsum("NC,CD->ND", slopes_NC, filled_CD, preferred_element_type=wide)
    by_table = jnp.einsum("NC,ND->CD", slopes_NC, x_ND, preferred_element_type=wide)
    return by_x.astype(x_ND.dtype), by_table[: len(table_CD)].astype(table_CD.dtype)


_wide_scores.defvjp(_wide_scores_fwd, _wide_scores_bwd)


def _token_table(run: RunSpec, rngs: nnx.Rngs) -> TokenTable:
    return TokenTable(
        run.data.tokens,
        run.model.token_types,
        run.model.d_model,
        embedding_scale(run.model),
        tied_output=run.model.tied_output,
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
        self.tokens = _token_table(run, rngs)
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
    """An encoder, one vector a row, and a linear layer.

    pooling "mean": the vector is the mean over a row's real positions. "first": tanh(pooler(x[b,0])), with dropout, as
    BERT reads its [CLS] (Devlin et al. 2019, section 3).
    """

    def __init__(self, run: RunSpec, *, rngs: nnx.Rngs) -> None:
        assert run.data.num_classes is not None  # RunSpec has refused it
        self.tokens = _token_table(run, rngs)
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
