"""The table of token vectors: what a model reads on the way in, and scores its outputs with on the way out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from mha_jax.attention.target import target
from mha_jax.models.feed_forward import param_dtype
from mha_jax.models.positions import embedding_scale
from mha_jax.specs import RunSpec, UserError


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


def token_table(run: RunSpec, rngs: nnx.Rngs) -> TokenTable:
    """The table of a run's vocabulary."""
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
