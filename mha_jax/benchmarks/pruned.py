"""What removed heads save: forward latency of a pruned model, of one built with its shape, and of the whole one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mha_jax import config as configs
from mha_jax.benchmarks.rounds import paired_ratio, race, summary
from mha_jax.benchmarks.train_step import language_model
from mha_jax.heads.pruning import count_of_fraction, random_scores, removal_order, what_is_left
from mha_jax.heads.surgery import head_shapes, keep_heads
from mha_jax.specs import BYTE_VOCAB_SIZE, HeadShape, RunSpec
from mha_jax.training.step import State, init_state, merge

PRUNED, BUILT, FULL = "pruned", "built with its shape", "full"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: a language model's forward pass without a share of its heads (Michel et al. 2019, table 4).

    Heads go in a random order over all layers, so that the layers left are uneven.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    percent: int = 50
    num_heads: int = 8
    num_layers: int = 4
    d_model: int = 256
    d_ff: int = 1024
    length: int = 128
    rounds: int = 15

    def __post_init__(self) -> None:
        HeadShape.resolve(self.d_model, self.num_heads)


def models(setting: Setting) -> dict[str, tuple[RunSpec, State]]:
    """The run and state of each contestant, on one seed."""
    full = language_model(
        setting.num_heads,
        num_layers=setting.num_layers,
        d_model=setting.d_model,
        d_ff=setting.d_ff,
        length=setting.length,
    )
    config, shapes, state = configs.plain(dataclasses.asdict(full)), head_shapes(full), _drawn(full)
    order = removal_order(shapes, random_scores(shapes, seed=0))
    keep = what_is_left(shapes, order, count_of_fraction(order, setting.percent / 100))
    section, smaller = keep_heads(config, state, keep)
    run = configs.resolve({**config, "model": section})
    return {PRUNED: (run, smaller), BUILT: (run, _drawn(run)), FULL: (full, state)}


def _drawn(run: RunSpec) -> State:
    return jax.jit(functools.partial(init_state, run))()


def forward_call(run: RunSpec, state: State, batch_size: int) -> Callable[[], Any]:
    """One forward pass over random bytes, compiled, that returns when its logits are there."""
    shape = (batch_size, run.data.length)
    tokens = jax.numpy.asarray(np.random.default_rng(0).integers(4, BYTE_VOCAB_SIZE, shape, dtype=np.int32))
    params, constants = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf[0]), (state["params"], state["constants"]))
    compiled = jax.jit(lambda *trees: merge(run, *trees[:2])(trees[2])).lower(params, constants, tokens).compile()
    return lambda: jax.block_until_ready(compiled(params, constants, tokens))


def measure(setting: Setting) -> dict[str, Any]:
    """Times every contestant at each batch size, in turns.

    Returns: "heads" of every layer by contestant; "rows", one a batch size: "seconds" by contestant, "ms" their
    summary, and "ratio" of the pruned model to each other, round by round.
    """
    contestants = models(setting)
    rows = []
    for batch_size in setting.batch_sizes:
        seconds = race({name: forward_call(*made, batch_size) for name, made in contestants.items()}, setting.rounds)
        ms = {name: summary([1e3 * s for s in values]) for name, values in seconds.items()}
        ratio = {name: paired_ratio(seconds[PRUNED], values) for name, values in seconds.items() if name != PRUNED}
        rows.append({"batch_size": batch_size, "seconds": seconds, "ms": ms, "ratio": ratio})
    heads = {name: [s.num_heads for s in head_shapes(run).values()] for name, (run, _) in contestants.items()}
    return {"heads": heads, "rows": rows}
