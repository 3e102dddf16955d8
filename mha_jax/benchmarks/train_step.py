"""One training step of a language model at several head counts: ours, its matrix products alone, and PyTorch's."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mha_jax.benchmarks import floor, programs
from mha_jax.benchmarks.parts import floor_parts, model_parts
from mha_jax.benchmarks.rounds import paired_ratio, race, summary
from mha_jax.specs import (
    DataSpec,
    DecodingSpec,
    MeshSpec,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    TrainingSpec,
)
from mha_jax.training.estimates import step_flops
from mha_jax.training.parallel import make_program

OURS, FLOOR, EAGER, COMPILED = "mha_jax", "matmul floor", "PyTorch eager", "PyTorch compiled"


def language_model(
    num_heads: int,
    *,
    num_layers: int = 4,
    d_model: int = 256,
    d_ff: int = 1024,
    length: int = 256,
    batch_size: int = 16,
    vocab_size: int | None = None,
    dtype: Any = "float32",
) -> RunSpec:
    """The run whose step is timed: no dropout, AdamW, one seed; heads times width is d_model.

    Args: vocab_size: left out, bytes. dtype: of the computation; parameters are float32.
    """
    vocabulary: dict[str, Any] = {} if vocab_size is None else {"tokenizer": "bpe", "vocab_size": vocab_size}
    return RunSpec(
        name="bench",
        task="lm",
        seeds=(0,),
        parallel="jit",
        mesh=MeshSpec(),
        model=ModelSpec(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            d_ff=d_ff,
            max_length=length,
            use_bias=False,
            dtype=dtype,
        ),
        data=DataSpec(source="embedded", length=length, batch_size=batch_size, **vocabulary),
        optimizer=OptimizerSpec(name="adamw", weight_decay=0.01),
        training=TrainingSpec(steps=10_000, eval_every=10_000, checkpoint_every=10_000),
        decoding=DecodingSpec(),
    )


def random_batch(run: RunSpec) -> dict[str, np.ndarray]:
    """Random tokens: the time of a step does not depend on what it reads."""
    shape = (run.data.batch_size, run.data.length)
    tokens = np.random.default_rng(0).integers(4, run.data.tokens, (2, *shape), dtype=np.int32)
    rows = np.arange(run.data.batch_size, dtype=np.int32)
    return {"inputs": tokens[0], "targets": tokens[1], "weights": np.ones(shape, np.float32), "row": rows}


def our_step(
    run: RunSpec, batch: dict[str, np.ndarray], devices: programs.Devices, steps: int = 1
) -> Callable[[], None]:
    """Some calls of the very program that training runs, the batch spread over the devices; waits for the last."""
    program = make_program(run, devices)
    state = program.init()
    stacked = {name: leaf[None] for name, leaf in batch.items()}

    def step() -> None:
        nonlocal state
        metrics = None
        for _ in range(steps):
            state, metrics = program.step(state, stacked)
        jax.block_until_ready((state, metrics))

    return step


def floor_step(run: RunSpec, devices: programs.Devices, steps: int = 1) -> Callable[[], object]:
    """The step's matrix products alone, forward and backward, chained as in the model and spread as the step is."""
    shape, weights = (run.data.batch_size * run.data.length, run.model.d_model), floor.draw_weights(run)
    x_ND = jax.random.normal(jax.random.key(2), shape, run.model.dtype)

    def products(weights: Any, x_ND: jax.Array) -> jax.Array:
        return floor.forward(run, weights, x_ND)

    out = jax.eval_shape(products, weights, x_ND)
    cotangent = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    one = programs.program(products, programs.BOTH, weights, x_ND, cotangent, devices)
    return functools.partial(one.call, steps)


def torch_steps(
    run: RunSpec, batch: dict[str, np.ndarray], steps: int = 1
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """PyTorch's step, eager and compiled, and one line on each that cannot run here."""
    if importlib.util.find_spec("torch") is None:
        return {}, ["PyTorch is not installed (requirements-bench.txt): not compared"]
    import torch  # pyright: ignore[reportMissingImports]

    from mha_jax.benchmarks.torch_lm import torch_step

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    make = functools.partial(torch_step, run, batch["inputs"], batch["targets"], device=device, steps=steps)
    peers: dict[str, Callable[[], object]] = {EAGER: make(compiled=False)}
    compiled = make(compiled=True)
    try:
        compiled()
    except Exception as error:  # whatever its compiler or the machine lacks; the line says what
        return peers, [
            f"torch.compile did not run at {run.model.num_heads} heads: {type(error).__name__}: {str(error)[:200]!r}"
        ]
    return {**peers, COMPILED: compiled}, []


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: a step of a language model at each head count; with `profile` the parts of our step as well.

    The default is of bytes in float32. 124 million parameters, as GPT-2's smallest: --num_layers=12 --d_model=768
    --d_ff=3072 --length=1024 --vocab_size=50257 --heads=12. On a GPU training waits for no step: --steps=8 waits for
    each eighth, and times are still those of one.
    """

    heads: tuple[int, ...] = (1, 4, 16, 32)
    num_layers: int = 4
    d_model: int = 256
    d_ff: int = 1024
    length: int = 256
    batch_size: int = 16
    vocab_size: int | None = None
    dtype: str | None = None
    devices: int | None = None
    steps: int = 1
    rounds: int = 15
    profile: bool = False

    @property
    def runs(self) -> list[RunSpec]:
        """One a head count."""
        names = ("num_layers", "d_model", "d_ff", "length", "batch_size", "vocab_size")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        return [language_model(heads, **sizes, dtype=programs.chosen_dtype(self.dtype)) for heads in self.heads]


def measure(setting: Setting) -> dict[str, Any]:
    """Times all contestants in turns, one head count after the other: together they would crowd the memory.

    Returns: "dtype" of the computation; "rows", one a run: "seconds" of every round by contestant, "step_ms" and
    "tokens_per_second" from their medians, "ratio" of our step to each other contestant's, taken round by round;
    "notes"; and with profile "profile", a head count's parts.
    """
    notes: list[str] = []
    devices = programs.share_out(setting.batch_size, programs.use_devices(setting.devices))
    rows, runs = [], setting.runs  # after the devices: to choose a dtype starts JAX
    for run in runs:
        batch = random_batch(run)
        peers, missing = torch_steps(run, batch, setting.steps)
        products = floor_step(run, devices, setting.steps)
        calls = {OURS: our_step(run, batch, devices, setting.steps), FLOOR: products, **peers}
        seconds = {name: [s / setting.steps for s in times] for name, times in race(calls, setting.rounds).items()}
        rows.append(result_row(run, seconds))
        notes += [line for line in missing if line not in notes]
    profiles = {run.model.num_heads: profile(run, setting.rounds) for run in runs} if setting.profile else {}
    return {"dtype": runs[0].model.dtype, "rows": rows, "notes": notes, "profile": profiles}


def result_row(run: RunSpec, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What a run's times say: milliseconds, tokens a second and paired ratios, and the times themselves."""
    tokens = run.data.batch_size * run.data.length
    step_ms = {name: summary([1e3 * s for s in values]) for name, values in seconds.items()}
    return {
        "num_heads": run.model.num_heads,
        "qk_dim": run.model.heads("decoder")[0].qk_dim,
        "step_flops": step_flops(run),
        "step_ms": step_ms,
        "tokens_per_second": {name: 1e3 * tokens / ms["median"] for name, ms in step_ms.items()},
        "ratio": {name: paired_ratio(seconds[OURS], values) for name, values in seconds.items() if name != OURS},
        "seconds": seconds,
    }


def profile(run: RunSpec, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each part in a step, and of its matrix products, and what the parts leave of the whole step.

    All is on the first device. Parts are compiled and timed alone, so a part pays for reading what the whole step has
    in cache or fuses away.
    """
    batch = random_batch(run)
    parts, products = model_parts(run, jax.tree.map(jax.numpy.asarray, batch)), floor_parts(run)
    calls = {("part", name): call for name, (_, call) in parts.items()}
    calls |= {("products", name): call for name, (_, call) in products.items()}
    seconds = race({**calls, ("step", ""): our_step(run, batch, jax.devices()[:1])}, rounds)

    def milliseconds(kind: str, name: str, times: int) -> float:
        return 1e3 * times * summary(seconds[kind, name])["median"]

    rows = []
    for name, (times, _) in parts.items():
        floor_ms = milliseconds("products", name, times) if name in products else 0.0
        rows.append({"part": name, "times": times, "ms": milliseconds("part", name, times), "matmul_ms": floor_ms})
    whole = milliseconds("step", "", 1)
    left = {"part": "rest of the step", "times": 1, "ms": whole - sum(row["ms"] for row in rows), "matmul_ms": 0.0}
    total = {"part": "step", "times": 1, "ms": whole, "matmul_ms": sum(row["matmul_ms"] for row in rows)}
    return [*rows, left, total]
