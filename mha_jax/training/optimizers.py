"""Adam and AdamW with the schedules of `OptimizerSpec`."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mha_jax.specs import GatesSpec, OptimizerSpec, RunSpec


class Hyperparameters(NamedTuple):
    """What the members of a pack may differ in, as arguments of the step: other values need no other program.

    Each [R] for a pack, a number for one member. They follow from the config and are in no checkpoint.
    """

    peak: Any
    weight_decay: Any


def hyperparameters(runs: Sequence[RunSpec]) -> Hyperparameters:
    """Those of every member of a pack, [R]: the seeds of the first run, then those of the second, and so on."""
    seeds = [len(run.seeds) for run in runs]
    values = [Hyperparameters(_peak(run.optimizer, run.model.d_model), run.optimizer.weight_decay) for run in runs]
    dtype = np.float64 if runs[0].model.dtype == "float64" else np.float32
    return Hyperparameters(
        peak=np.repeat(np.asarray([value.peak for value in values], np.float32), seeds),
        weight_decay=np.repeat(np.asarray([value.weight_decay for value in values], dtype), seeds),
    )


def _peak(spec: OptimizerSpec, d_model: int) -> float:
    """What a schedule multiplies: the spec's rate, for "vaswani" times d_model ** -0.5."""
    return spec.learning_rate * (d_model**-0.5 if spec.schedule == "vaswani" else 1.0)


def learning_rate(
    spec: OptimizerSpec, d_model: int, steps: int, peak: jax.typing.ArrayLike | None = None
) -> optax.Schedule:
    """The learning rate of each update, from the count of updates already made (0 at the first).

    With n = count + 1, peak = spec.learning_rate and w = spec.warmup_steps:

      vaswani   peak * d_model ** -0.5 * min(n ** -0.5, n * w ** -1.5)      (Vaswani et al. 2017, section 5.3)
      constant  peak * min(1, n / w)
      cosine    peak * n / w up to n = w; then half a cosine down to peak * spec.final_fraction at n = steps

    No update has rate 0 unless spec.final_fraction is 0. Base model of the paper: d_model=512, w=4000, peak=1 gives
    6.99e-4 at n = 4000.

    Args: peak: as `Hyperparameters` holds it; default: the spec's.
    """
    warmup, peak = spec.warmup_steps, _peak(spec, d_model) if peak is None else peak

    def vaswani(count: jax.typing.ArrayLike) -> jax.Array:
        n = jnp.asarray(count, jnp.float32) + 1.0
        return jnp.asarray(peak * jnp.minimum(n**-0.5, n * warmup**-1.5))

    def constant(count: jax.typing.ArrayLike) -> jax.Array:
        n = jnp.asarray(count, jnp.float32) + 1.0
        return jnp.asarray(peak * jnp.minimum(1.0, n / max(warmup, 1)))

    def cosine(count: jax.typing.ArrayLike) -> jax.Array:
        n = jnp.asarray(count, jnp.float32) + 1.0
        progress = jnp.clip((n - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return constant(count) * (spec.final_fraction + (1.0 - spec.final_fraction) * decay)

    return {"vaswani": vaswani, "constant": constant, "cosine": cosine}[spec.schedule]


def decayed(params: Any) -> Any:
    """True for the kernels: what weight decay applies to. By name, because a bias of attention has two axes too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" in jax.tree_util.keystr(path, simple=True, separator="/").split("/"), params
    )


def with_gates_and_frozen(
    optimizer: optax.GradientTransformation, gates: GatesSpec, frozen: tuple[str, ...]
) -> optax.GradientTransformation:
    """The optimizer with the updates of learned gates multiplied, and no updates of the parts that are frozen."""
    parts = [optimizer]
    if gates.kind != "none" and gates.learning_rate_multiplier != 1:
        parts.append(optax.masked(optax.scale(gates.learning_rate_multiplier), _named("learned_gate")))
    if frozen:
        parts.append(optax.masked(optax.set_to_zero(), _named(*frozen)))
    return optimizer if len(parts) == 1 else optax.chain(*parts)


def _named(*names: str) -> Any:
    """A mask that is true for the leaves below any of these names."""

    def named(path: Any, _: Any) -> bool:
        return not set(names).isdisjoint(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))

    return functools.partial(jax.tree_util.tree_map_with_path, named)


def make_optimizer(
    spec: OptimizerSpec, d_model: int, steps: int, given: Hyperparameters | None = None
) -> optax.GradientTransformation:
    """Clipping by global norm, Adam's moments, decoupled weight decay on kernels, the schedule; in this order.

      u = m / (sqrt(v) + epsilon) + weight_decay * kernel;  kernel <- kernel - rate * u     (Loshchilov, Hutter 2019)

    Biases, LayerNorm scales, embeddings and learned positions do not decay.

    Args: given: peak and weight decay of one member, which may be traced; default: the spec's.
    """
    given = given or Hyperparameters(_peak(spec, d_model), spec.weight_decay)
    clip = optax.identity() if spec.clip_norm is None else optax.clip_by_global_norm(spec.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=spec.beta1, b2=spec.beta2, eps=spec.epsilon),
        optax.add_decayed_weights(given.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(spec, d_model, steps, given.peak)),
    )
