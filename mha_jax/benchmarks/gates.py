"""What gates cost: one training step of a language model with each way of gating its heads, beside one without."""

import dataclasses
from typing import Any

from mha_jax.benchmarks import programs
from mha_jax.benchmarks.rounds import paired_ratio, race, summary
from mha_jax.benchmarks.train_step import language_model, our_step, random_batch
from mha_jax.specs import GatesSpec

NONE = "no gates"
WAYS = {
    NONE: GatesSpec(),
    "no gates again": GatesSpec(),  # how far two programs that are the same lie apart
    "scalar": GatesSpec(kind="scalar"),
    "hard concrete": GatesSpec(kind="hard_concrete", l0_weight=0.01),
    "pruned on a schedule": GatesSpec(prune_to=0.5),
    "DropHead": GatesSpec(head_drop_rate=0.1),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: a training step of one language model, with each way of gating its heads."""

    num_heads: int = 8
    num_layers: int = 4
    d_model: int = 256
    d_ff: int = 1024
    length: int = 256
    batch_size: int = 16
    devices: int | None = None
    rounds: int = 25


def measure(setting: Setting) -> dict[str, Any]:
    """Times all ways in turns.

    Returns: "rows", one a way: its name, "seconds" of every round, "step_ms" from their median, and "ratio" of its step
    to that without gates, taken round by round.
    """
    sizes = dataclasses.asdict(setting)
    for other in ("devices", "rounds"):
        del sizes[other]
    run = language_model(**sizes)
    batch = random_batch(run)
    devices = programs.share_out(setting.batch_size, programs.use_devices(setting.devices))
    steps = {name: our_step(dataclasses.replace(run, gates=gates), batch, devices) for name, gates in WAYS.items()}
    seconds = race(steps, setting.rounds)
    return {
        "rows": [
            {
                "gates": name,
                "seconds": values,
                "step_ms": summary([1e3 * s for s in values]),
                "ratio": paired_ratio(values, seconds[NONE]),
            }
            for name, values in seconds.items()
        ]
    }
