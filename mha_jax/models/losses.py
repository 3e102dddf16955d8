"""The loss of each task, as sums, so that any split of a batch over devices adds up to the same numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Batch = dict[str, Any]


def token_losses(
    logits: Float[Array, "*N C"], targets: Int[Array, "*N"], label_smoothing: float = 0.0
) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """The smoothed training objective and the plain negative log-likelihood of every target, both in nats.

      nll = log sum_c exp(z_c) - z_y        objective = (1 - eps) nll + eps (log sum_c exp(z_c) - mean_c z_c)

    (Szegedy et al. 2016, section 7: eps is spread over the whole vocabulary.)
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    nll = log_normalizer - jnp.asarray(_picked(logits.shape[-1], logits, targets))
    if not label_smoothing:
        return nll, nll
    smooth = log_normalizer - jnp.mean(logits, axis=-1)
    return (1 - label_smoothing) * nll + label_smoothing * smooth, nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _picked(num_classes: int, logits: Float[Array, "*N C"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """The logit of every target: read one by one, without a pass over all logits.

    The gradient of a gather is a scatter, slow on CPU and TPU; a comparison fuses with the other slopes of the logits.
    """
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _picked_fwd(num_classes: int, logits: Array, targets: Array) -> tuple[Array, Array]:
    return _picked(num_classes, logits, targets), targets


def _picked_bwd(num_classes: int, targets: Array, slopes: Array) -> tuple[Array, None]:
    hit = targets[..., None] == jnp.arange(num_classes).reshape((1,) * targets.ndim + (-1,))
    return jnp.where(hit, slopes[..., None], 0), None


_picked.defvjp(_picked_fwd, _picked_bwd)


def example_sums(
    task: str, model: Any, batch: Batch, dropout_keys: Array | None = None, label_smoothing: float = 0.0
) -> dict[str, Float[Array, " B"]]:
    """One batch through the model: each example's "objective", "loss", "correct", "weight", summed over its targets.

    For classification a target is the label of an example, else a token; `weights` 0 marks padding. `dropout_keys` has
    one key an example; None evaluates. One function serves training, evaluation and what looks into heads.
    """
    if task == "lm":
        logits = model(batch["inputs"], segments=batch.get("segments"), dropout_keys=dropout_keys)
        targets = batch["targets"]
    elif task == "masked_lm":
        logits = model(batch["inputs"], batch["lengths"], dropout_keys=dropout_keys)
        targets = batch["targets"]
    elif task == "translation":
        logits = model(batch["source"], batch["source_lengths"], batch["target_inputs"], dropout_keys=dropout_keys)
        targets = batch["targets"]
    else:
        logits = model(batch["inputs"], batch["lengths"], dropout_keys=dropout_keys)
        targets = batch["labels"]
    weights = batch["weights"].astype(logits.dtype)
    objective, nll = token_losses(logits, targets, label_smoothing)
    correct = jnp.argmax(logits, axis=-1) == targets
    sums = {"objective": objective * weights, "loss": nll * weights, "correct": correct * weights, "weight": weights}
    return {name: jnp.sum(x.reshape(x.shape[0], -1), axis=-1) for name, x in sums.items()}


def loss_sums(
    task: str, model: Any, batch: Batch, dropout_keys: Array | None, label_smoothing: float
) -> dict[str, Array]:
    """The sums of `example_sums` over the whole batch."""
    sums = example_sums(task, model, batch, dropout_keys, label_smoothing)
    return {name: jnp.sum(x) for name, x in sums.items()}
