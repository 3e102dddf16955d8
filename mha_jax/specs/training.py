"""The sections that say how a model is trained and read out: optimizer, training, decoding."""

import dataclasses
from typing import Literal

from mha_jax.specs.checks import UserError, at_least, choice, rate


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """AdamW or Adam with a schedule. For "vaswani", `learning_rate` multiplies the paper's rate (section 5.3)."""

    name: Literal["adamw", "adam"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "vaswani", "constant"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        choice("optimizer.name", self.name, ("adamw", "adam"))
        choice("optimizer.schedule", self.schedule, ("cosine", "vaswani", "constant"))
        at_least("optimizer.warmup_steps", self.warmup_steps, 1 if self.schedule == "vaswani" else 0)
        for field in ("learning_rate", "epsilon"):
            if not getattr(self, field) > 0:
                raise UserError(f"optimizer.{field}={getattr(self, field)!r} must be positive")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm={self.clip_norm!r} must be positive, or None for no clipping")
        if self.name == "adam" and self.weight_decay:
            raise UserError(f"optimizer.weight_decay={self.weight_decay} needs optimizer.name='adamw'")
        for field in ("beta1", "beta2", "final_fraction", "weight_decay"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"optimizer.{field}={getattr(self, field)!r} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """How long, how often, what is kept. `average_last` checkpoints are averaged for the final evaluation.

    `start_from`: the directory of a finished run, whose parameters are those of step 0, seed by seed. Its name, which
    ends with the hash of its config, counts in a run's hash; where it lies does not. A classifier may start from a
    masked language model: the last layers of each are its own.
    `freeze`: parts of the model that training leaves as they are: "tokens" (the table), "encoder", "decoder".
    """

    steps: int
    eval_every: int
    checkpoint_every: int
    log_every: int = 10
    keep_last: int = 2
    average_last: int = 1
    label_smoothing: float = 0.0
    start_from: str | None = None
    freeze: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("steps", "eval_every", "checkpoint_every", "log_every", "keep_last", "average_last"):
            at_least(f"training.{field}", getattr(self, field), 1)
        rate("training.label_smoothing", self.label_smoothing)
        if self.average_last > self.keep_last:
            raise UserError(
                f"training.average_last={self.average_last} averages more checkpoints than "
                f"training.keep_last={self.keep_last} keeps"
            )


@dataclasses.dataclass(frozen=True)
class DecodingSpec:
    """Beam search for translation. `length_penalty` is GNMT's alpha (Wu et al. 2016, eq. 14)."""

    beam_size: int = 4
    length_penalty: float = 0.6
    batch_size: int = 64
    max_sentences: int | None = None

    def __post_init__(self) -> None:
        at_least("decoding.beam_size", self.beam_size, 1)
        at_least("decoding.batch_size", self.batch_size, 1)
        if not self.length_penalty >= 0:
            raise UserError(f"decoding.length_penalty={self.length_penalty!r} must not be negative")
