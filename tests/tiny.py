"""Runs small enough to train in a test: sizes are distinct and mostly prime, so that no swapped axis fits by luck."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import default
from mha_jax.config import override, resolve
from mha_jax.models.losses import Batch
from mha_jax.specs import RunSpec
from mha_jax.training.step import abstract_batches

_MODEL = {"num_layers": 2, "d_model": 12, "num_heads": 4, "qk_dim": 2, "v_dim": 5, "d_ff": 14, "max_length": 16}
_TASKS: dict[str, dict[str, Any]] = {
    "lm": {"data.source": "text", "data.files.train": "unused.txt"},
    "masked_lm": {"data.source": "text", "data.files.train": "unused.txt"},
    "translation": {
        "data.source": "parallel",
        "data.files.train": ("unused.en", "unused.de"),
        "data.buckets": (7, 13),
        "data.batch_tokens": 8 * 13,
    },
    "classification": {"data.source": "tfds", "data.tfds_name": "unused", "data.num_classes": 3},
}


def config(task: str = "lm", seeds: tuple[int, ...] = (0, 1), **overrides: Any) -> ConfigDict:
    """A tiny config of a task; overrides are dotted names with "__" for the dot."""
    values = {f"model.{name}": value for name, value in _MODEL.items()}
    values |= {"name": "tiny", "task": task, "seeds": seeds, "data.length": 13, "data.batch_size": 8}
    values |= {"training.steps": 20, "training.eval_every": 10, "training.checkpoint_every": 10}
    values |= {"optimizer.warmup_steps": 3, "optimizer.learning_rate": 3e-3}
    values |= _TASKS[task] | {name.replace("__", "."): value for name, value in overrides.items()}
    return override(default.get_config(), values)


def run(task: str = "lm", seeds: tuple[int, ...] = (0, 1), **overrides: Any) -> RunSpec:
    """The spec of `config`."""
    return resolve(config(task, seeds, **overrides))


def batches(spec: RunSpec, steps: int) -> list[Batch]:
    """Random batches of the shapes that the run trains on, [R, B, ...], a function of (seed, step)."""
    shapes = abstract_batches(spec)
    return [
        _stack([_batch(spec, shapes[step % len(shapes)], seed, step) for seed in spec.seeds]) for step in range(steps)
    ]


def _stack(parts: list[Batch]) -> Batch:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def _batch(spec: RunSpec, shapes: Batch, seed: int, step: int) -> Batch:
    rng = np.random.default_rng((seed, step))
    batch = {}
    for name, struct in shapes.items():
        shape = struct.shape[1:]
        if name == "row":
            value = np.arange(shape[0])
        elif name == "weights":
            value = rng.random(shape) < 0.8
        elif name == "labels":
            value = rng.integers(0, spec.data.num_classes or 1, shape)
        elif "lengths" in name:
            value = rng.integers(1, spec.data.buckets[0] if spec.data.buckets else spec.data.length, shape)
        elif name == "segments":
            value = np.cumsum(rng.random(shape) < 0.2, axis=-1)
        else:
            value = rng.integers(4, spec.data.tokens, shape)
        batch[name] = value.astype(struct.dtype)
    return batch
