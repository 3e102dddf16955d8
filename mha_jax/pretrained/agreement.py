"""How closely our float32 model follows a checkpoint: layer by layer against a float64 forward pass of its tensors."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mha_jax.attention.visibility import Causal, Padding
from mha_jax.models.transformer import Classifier, LanguageModel, MaskedLanguageModel
from mha_jax.pretrained.families import Checkpoint
from mha_jax.pretrained.llama2c import Llama2c

OneStack = LanguageModel | MaskedLanguageModel | Classifier


def hidden_states(
    model: OneStack, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"]
) -> tuple[Float[Array, "N B T D"], Array]:
    """What enters the first of L layers and what each hands on, N = L + 1 (a last norm not applied), and the logits."""
    if isinstance(model, LanguageModel):
        stack, rule, logits = model.decoder, Causal(), model(tokens_BT)
    else:
        stack, rule, logits = model.encoder, Padding(lengths_B), model(tokens_BT, lengths_B)
    x_BTD = stack.enter(model.tokens.embed(tokens_BT), jnp.arange(tokens_BT.shape[1]))
    states = [x_BTD]
    for block in stack.blocks:
        states.append(block(states[-1], rule))
    return jnp.stack(states), logits


def agreement(checkpoint: Checkpoint | Llama2c, model: OneStack, rows: Sequence[np.ndarray]) -> dict[str, Any]:
    """The largest absolute differences over rows of tokens, which go through the model as one padded batch.

    Returns: "layers": of what enters the first layer and what each hands on, with the largest value there as "largest";
        "logits" and "largest_logit" likewise; "rows" and "tokens" that were compared.
    """
    lengths = [len(row) for row in rows]
    tokens_BT = np.zeros((len(rows), max(lengths)), np.int32)
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row)] = row
    states_NBTD, logits = jax.jit(hidden_states)(model, jnp.asarray(tokens_BT), jnp.asarray(lengths, jnp.int32))
    apart, largest = [], []
    for number, row in enumerate(rows):
        ours = [*np.asarray(states_NBTD)[:, number, : len(row)], np.asarray(logits)[number]]
        theirs = checkpoint.hidden_states(np.asarray(row))
        ours[-1] = ours[-1][: len(row)] if ours[-1].ndim == 2 else ours[-1]
        apart.append([float(np.abs(one - other).max()) for one, other in zip(ours, theirs, strict=True)])
        largest.append([float(np.abs(other).max()) for other in theirs])
    *layers, logits_apart = np.max(apart, axis=0).tolist()
    *layers_largest, logits_largest = np.max(largest, axis=0).tolist()
    found: dict[str, Any] = {"rows": len(rows), "tokens": sum(lengths), "layers": layers, "largest": layers_largest}
    return found | {"logits": logits_apart, "largest_logit": logits_largest}
