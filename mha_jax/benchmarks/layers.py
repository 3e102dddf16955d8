"""What scanning layers, or computing them again, costs to compile, to run and to hold, as models get deeper."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mha_jax.benchmarks.rounds import race, summary
from mha_jax.benchmarks.train_step import language_model, random_batch
from mha_jax.specs import RunSpec
from mha_jax.training.parallel import make_program

LAYERS, REMATS = ("unrolled", "scan"), ("none", "attention", "dots", "block")


def in_a_way(run: RunSpec, layers: str, remat: str) -> RunSpec:
    """The run with `model.layers` and `model.remat` as given, and all else as it is."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, layers=layers, remat=remat))


def compiled_step(run: RunSpec, batch: dict[str, np.ndarray]) -> tuple[Callable[[], None], float, int | None]:
    """A call of the step that training runs, seconds to trace and compile it, and the bytes that XLA plans to hold.

    The step is compiled anew, whatever a compilation cache on disk may hold.
    """
    program, stacked = make_program(run, jax.devices()[:1]), {name: leaf[None] for name, leaf in batch.items()}
    state = program.init()

    def step() -> None:
        nonlocal state
        state, metrics = program.step(state, stacked)
        jax.block_until_ready((state, metrics))

    cached = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        step()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    return step, program.compile_seconds, program.predicted_peak_bytes


def measure_layers(
    rounds: int,
    *,
    depths: Sequence[int] = (4, 12, 24),
    num_heads: int = 4,
    d_model: int = 64,
    d_ff: int = 256,
    length: int = 64,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Every depth with every choice of `model.layers` and `model.remat`; those of one depth are timed in turns.

    Returns: rows of "num_layers", "layers", "remat", "compile_seconds" (tracing included), "step_ms" (median, least
    and greatest) and "peak_bytes" (XLA's plan; None where it makes none).
    """
    rows = []
    for depth in depths:
        run = language_model(
            num_heads, num_layers=depth, d_model=d_model, d_ff=d_ff, length=length, batch_size=batch_size
        )
        batch = random_batch(run)
        if not rows:
            # What JAX traces once a process belongs to no contestant.
            compiled_step(in_a_way(run, "scan", "none"), batch)
        ways = list(itertools.product(LAYERS, REMATS))
        steps = {way: compiled_step(in_a_way(run, *way), batch) for way in ways}
        seconds = race({way: step for way, (step, _, _) in steps.items()}, rounds)
        rows += [
            {
                "num_layers": depth,
                "layers": layers,
                "remat": remat,
                "compile_seconds": steps[layers, remat][1],
                "step_ms": summary([1e3 * s for s in seconds[layers, remat]]),
                "peak_bytes": steps[layers, remat][2],
            }
            for layers, remat in ways
        ]
    return rows
