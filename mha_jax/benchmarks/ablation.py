"""Leave-one-out of every head: over a kept prefix, in a loop that sets one gate at a time, and in a process a head."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mha_jax.benchmarks.rounds import paired_ratio, race, summary
from mha_jax.benchmarks.train_step import language_model
from mha_jax.heads.ablation import leave_one_out
from mha_jax.heads.capture import Batch, attentions
from mha_jax.heads.prefix import with_gates
from mha_jax.heads.tables import Heads
from mha_jax.models import build_model
from mha_jax.models.losses import example_sums
from mha_jax.models.transformer import Model
from mha_jax.specs import BYTE_VOCAB_SIZE, HeadShape

OURS, LOOP = "kept prefix", "one gate at a time"
ALL_HEADS, ONE_HEAD = "kept prefix, whole process", "process a head"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: the loss of a language model without each of its heads in turn, over all batches.

    `processes` is how many processes with one head each are run; all heads are reckoned from their median.
    """

    num_layers: int = 12
    num_heads: int = 12
    d_model: int = 96
    d_ff: int = 384
    length: int = 64
    batch_size: int = 8
    batches: int = 2
    rounds: int = 5
    processes: int = 2

    def __post_init__(self) -> None:
        HeadShape.resolve(self.d_model, self.num_heads)


def measure(setting: Setting) -> dict[str, Any]:
    """Times both ways in turns in this process, then whole processes, one that does all heads and some that do one.

    Returns: "seconds" of every round by contestant, "first_seconds" of their first calls, which compile, "summary" and
    "ratio" (theirs over ours, round by round); the same for "processes", of all heads each; "difference", the largest
    in a head's loss between the two ways, in nats a token.
    """
    model, batches = drawn(setting)
    ways: dict[str, Callable[[], Heads]] = {
        OURS: lambda: _per_token(leave_one_out("lm", model, batches).sums["loss"], batches),
        LOOP: lambda: _per_token(one_at_a_time(model, batches), batches),
    }
    first_seconds, losses = {}, {}
    for name, run in ways.items():
        start = time.perf_counter()
        losses[name] = run()
        first_seconds[name] = time.perf_counter() - start
    seconds = race(ways, setting.rounds)
    return {
        "heads": setting.num_layers * setting.num_heads,
        "first_seconds": first_seconds,
        "seconds": seconds,
        "summary": {name: summary(values) for name, values in seconds.items()},
        "ratio": paired_ratio(seconds[LOOP], seconds[OURS]),
        "processes": _processes(setting),
        "difference": max(float(np.abs(losses[OURS][name] - losses[LOOP][name]).max()) for name in losses[OURS]),
    }


def drawn(setting: Setting) -> tuple[Model, list[Batch]]:
    """A model and batches at random: the time does not depend on what either holds."""
    run = language_model(
        setting.num_heads,
        num_layers=setting.num_layers,
        d_model=setting.d_model,
        d_ff=setting.d_ff,
        length=setting.length,
        batch_size=setting.batch_size,
    )
    shape = (setting.batches, 2, setting.batch_size, setting.length)
    tokens = np.random.default_rng(0).integers(4, BYTE_VOCAB_SIZE, shape, dtype=np.int32)
    weights = jnp.ones(shape[2:])
    batches: list[Batch] = [
        {"inputs": jnp.asarray(inputs), "targets": jnp.asarray(targets), "weights": weights}
        for inputs, targets in tokens
    ]
    return nnx.jit(lambda: build_model(run, rngs=nnx.Rngs(0)))(), batches


@jax.jit
def _gated_loss(model: Model, batch: Batch, gates: dict[str, jax.Array]) -> jax.Array:
    return example_sums("lm", with_gates(model, gates), batch)["loss"]


def one_at_a_time(model: Model, batches: list[Batch], heads: dict[str, list[int]] | None = None) -> Heads:
    """{attention: loss of every example, [H, E]} without each head (default: all), by one program for all of them.

    Losses are fetched when all are on their way, so that nothing waits between calls.
    """
    shapes = {name: layer.shape for name, layer in attentions(model).items()}
    heads = {name: list(range(shape.num_heads)) for name, shape in shapes.items()} if heads is None else heads
    ones = {name: np.ones(shape.num_heads, np.float32) for name, shape in shapes.items()}

    def without(name: str, head: int) -> list[jax.Array]:
        gates = {**ones, name: np.where(np.arange(len(ones[name])) == head, 0, ones[name]).astype(np.float32)}
        return [_gated_loss(model, batch, gates) for batch in batches]

    found = jax.device_get({name: [without(name, head) for head in own] for name, own in heads.items()})
    return {name: np.stack([np.concatenate(rows) for rows in own]).astype(np.float64) for name, own in found.items()}


def _per_token(sums: Heads, batches: list[Batch]) -> Heads:
    tokens = sum(batch["inputs"].size for batch in batches)
    return {name: sums_NE.sum(axis=1) / tokens for name, sums_NE in sums.items()}


def _processes(setting: Setting) -> dict[str, Any]:
    """Seconds for all heads: of one process that does them all, and of as many processes as there are heads."""
    heads = setting.num_layers * setting.num_heads
    # From the first head to the last, evenly.
    chosen = np.linspace(0, heads - 1, setting.processes).round().astype(int)
    seconds = {ALL_HEADS: [], ONE_HEAD: []}
    for head in chosen:
        seconds[ALL_HEADS].append(_process_seconds(setting, None))
        seconds[ONE_HEAD].append(heads * _process_seconds(setting, int(head)))
    return {
        "seconds": seconds,
        "summary": {name: summary(values) for name, values in seconds.items()},
        "ratio": paired_ratio(seconds[ONE_HEAD], seconds[ALL_HEADS]),
    }


def _process_seconds(setting: Setting, head: int | None) -> float:
    """Of a process of its own, from its start to its end, for one head or all; it compiles what it runs."""
    code = f"from mha_jax.benchmarks import ablation as a; a.in_a_process(a.{setting!r}, {head!r})"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def in_a_process(setting: Setting, head: int | None) -> None:
    """What a process does that is started for one head, counted over all layers, or for all."""
    model, batches = drawn(setting)
    if head is None:
        leave_one_out("lm", model, batches)
        return
    layer, number = divmod(head, setting.num_heads)
    one_at_a_time(model, batches, {f"decoder/{layer}/attention": [number]})
