"""The training loop of one run, all its seeds at once: evaluate and save if due, then take the batch, then step.

What it leaves in the run's directory is a function of the config: a run that was stopped or killed at any moment and
started again ends with the same parameters and the same metrics (timings aside).
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from mha_jax.config import config_hash
from mha_jax.data import load
from mha_jax.models import cost
from mha_jax.specs import RunSpec, UserError
from mha_jax.training.checkpoints import Checkpoints
from mha_jax.training.clock import Clock
from mha_jax.training.diagnosis import first_non_finite
from mha_jax.training.evaluation import average, count_heads, evaluate, evaluate_bleu, seed_gates
from mha_jax.training.finished import parent_state, with_parent
from mha_jax.training.metrics import MetricsLog
from mha_jax.training.parallel import JitProgram, make_program
from mha_jax.training.step import State


class NonFiniteLoss(RuntimeError):
    """Loss or gradient is NaN or infinite. The last checkpoint is from before."""


@dataclasses.dataclass
class Window:
    """The training log since its last line. It is saved with the state, so that a resumed run logs the same means."""

    steps: int = 0
    loss: np.ndarray | float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        self.steps += 1
        self.loss = self.loss + np.asarray(metrics["loss"], np.float64)
        self.tokens += float(metrics["tokens"].sum())

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "loss": np.asarray(self.loss).tolist()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Window":
        return cls(**{**saved, "loss": np.asarray(saved["loss"], np.float64)})


class _Training:
    """The pieces of one run in progress. `train` below is the story; these are its verbs."""

    def __init__(self, config: Any, run: RunSpec, directory: epath.Path, cache_dir: epath.Path, report: Any):
        self.run, self.report, self.directory = run, report, directory
        self.config_hash = config_hash(config)
        self.clock = Clock()
        with self.clock("data"):
            self.data = load(run.data, run.task, cache_dir)
            if self.data.tokenizer.path:
                file = self.data.tokenizer.path
                file.copy(directory / file.name, overwrite=True)
        self.program: JitProgram = make_program(run, jax.devices())
        self.log = MetricsLog(directory, run.seeds)
        self.checkpoints = Checkpoints(directory / "checkpoints", keep_last=run.training.keep_last)
        self.window = Window()
        self.validation_loss: float | None = None
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def restore(self) -> tuple[int, State]:
        """The newest good checkpoint, or step 0; the log is cut back to it."""
        with self.clock("save"):
            restored = self.checkpoints.restore(self.program.abstract_state())
        for problem in self.checkpoints.problems:
            tqdm.write(f"warning: {problem}")
        if restored is None and self.run.parent is not None:
            raise UserError(
                f"{self.checkpoints.directory} has no good checkpoint, and a run made out of {self.run.parent['run']} "
                "has no other start: make it again"
            )
        if restored is None:
            self.log.rewind(-1)
            return 0, self._initial_state()
        if restored.metadata["config_hash"] != self.config_hash:
            raise UserError(
                f"{self.checkpoints.directory} holds checkpoints of config {restored.metadata['config_hash']}; "
                f"this run is {self.config_hash}: use another directory"
            )
        # The rows of the last step itself are those of `finish`, which runs again.
        self.log.rewind(restored.step, keep_evaluations=restored.step < self.run.training.steps)
        self.window = Window.from_dict(restored.metadata["window"])
        return restored.step, self.program.load(restored.state)

    def _initial_state(self) -> State:
        parent = None if self.run.training.start_from is None else parent_state(self.run)
        with self.clock("compile"):
            state = self.program.init()
        if parent is None:
            return state
        return self.program.load(with_parent(self.program.unload(state), parent))

    def step(self, state: State, batch: dict[str, Any], number: int) -> State:
        """Dispatches step `number` (from 1) and only then waits for the metrics of the one before."""
        compiled = self.program.compile_seconds
        before = self.clock.seconds["train"]
        with self.clock("train"):
            state, metrics = self.program.step(state, batch)
            self._settle(state)
        compiled = self.program.compile_seconds - compiled
        self.clock.move(compiled, "train", "compile")
        self.window.seconds += self.clock.seconds["train"] - before
        self._pending = (number, metrics)
        return state

    def settle(self, state: State) -> None:
        """Waits for the last dispatched step and books it."""
        before = self.clock.seconds["train"]
        with self.clock("train"):
            self._settle(state)
        self.window.seconds += self.clock.seconds["train"] - before

    def _settle(self, state: State) -> None:
        if self._pending is None:
            return
        number, on_device = self._pending
        self._pending = None
        metrics = jax.device_get(on_device)
        if not metrics["good"].all():
            self._stop_on_non_finite(state, number, metrics["good"])
        self.window.add(metrics)
        if number % self.run.training.log_every == 0 or number == self.run.training.steps:
            self._log_window(number, metrics)

    def _stop_on_non_finite(self, state: State, number: int, good: np.ndarray) -> None:
        seed = self.run.seeds[int(np.argmin(good))]
        batch = self.data.train_batch(seed, number - 1)
        where = first_non_finite(self.run, self.program.unload(state), self.run.seeds.index(seed), batch)
        raise NonFiniteLoss(f"loss is not finite at step {number}, seed {seed}; first seen in {where}")

    def _log_window(self, number: int, metrics: dict[str, np.ndarray]) -> None:
        window, self.window = self.window, Window()
        values = {
            "loss": np.asarray(window.loss) / window.steps,
            "learning_rate": metrics["learning_rate"],
            "grad_norm": metrics["grad_norm"],
            **{name: value for name, value in metrics.items() if name.endswith("_loss")},
            "step_seconds": window.seconds / window.steps,
            "tokens_per_second": window.tokens / max(window.seconds, 1e-9),
        }
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if peak is not None:
            values["peak_bytes"] = peak
        self.log.write(number, "train", values)
        self.report(self.facts(number))

    def facts(self, step: int) -> dict[str, Any]:
        """What the run's status tells about itself while it goes."""
        return {
            "step": step,
            "seconds": {name: round(value, 3) for name, value in self.clock.seconds.items()},
            "predicted_peak_bytes": self.program.predicted_peak_bytes,
            "attention": self.program.attention,
        }

    def evaluate(self, state: State, step: int) -> dict[str, np.ndarray]:
        compiled = self.program.compile_seconds
        with self.clock("eval"):
            state = self.program.unload(state)
            values = evaluate(self.program, state["params"], state["constants"], self.data, "validation")
            values |= count_heads(self.run, state["params"], state["constants"])
        self.clock.move(self.program.compile_seconds - compiled, "eval", "compile")
        self.validation_loss = float(np.mean(values["loss"]))
        self.log.write(step, "validation", values)
        return values

    def save(self, state: State, step: int) -> None:
        with self.clock("save"):
            metadata = {"config_hash": self.config_hash, "window": self.window.as_dict()}
            self.checkpoints.save(step, self.program.unload(state), metadata, metric=self.validation_loss)

    def finish(self, state: State) -> None:
        """The numbers of the table: every split, whole, with the averaged parameters where averaging is asked for."""
        run, step = self.run, self.run.training.steps
        state = self.program.unload(state)
        with self.clock("save"):
            self.checkpoints.wait()
            params = self._averaged(state)
        compiled = self.program.compile_seconds
        with self.clock("eval"):
            for split in self.data.splits:
                values = evaluate(self.program, params, state["constants"], self.data, split)
                values |= count_heads(run, params, state["constants"])
                if run.task == "translation":
                    scores, signature, sentences = evaluate_bleu(
                        self.program, params, state["constants"], self.data, split
                    )
                    values |= scores
                    self._write_translations(split, sentences)
                    self.report({"bleu_signature": signature})
                self.log.write(step, split, values)
        self.clock.move(self.program.compile_seconds - compiled, "eval", "compile")
        if run.gates.prunes:
            gates = json.dumps(seed_gates(run, params, state["constants"]), indent=1)
            (self.directory / "gates.json").write_text(gates + "\n")
        self.log.write(step, "train", {"compile_seconds": self.clock.seconds["compile"]})
        self.log.close()
        self.checkpoints.close()
        self.report(self.facts(step))

    def _averaged(self, state: State) -> Any:
        steps = self.checkpoints.steps()[-self.run.training.average_last :]
        if len(steps) < 2:
            return state["params"]
        abstract = self.program.abstract_state()
        saved = [self.checkpoints.restore(abstract, step=step) for step in steps]
        return average([one.state["params"] for one in saved if one is not None])

    def _write_translations(self, split: str, sentences: list[list[str]]) -> None:
        folder = self.directory / "translations"
        folder.mkdir(parents=True, exist_ok=True)
        for seed, lines in zip(self.run.seeds, sentences, strict=True):
            (folder / f"{split}.seed{seed}.txt").write_text("\n".join(line.replace("\n", " ") for line in lines) + "\n")


@contextlib.contextmanager
def _progress(run: RunSpec, start: int, shown: bool) -> Iterator[Any]:
    with tqdm(total=run.training.steps, initial=start, desc=run.name, unit="step", disable=not shown) as bar:
        yield bar


def train(
    config: Any,
    run: RunSpec,
    directory: epath.Path,
    *,
    cache_dir: epath.Path,
    report: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool],
    progress: bool = True,
) -> Literal["done", "stopped"]:
    """Trains a run from its newest good checkpoint to its last step, and evaluates it.

    Args:
      config:      the resolved config that `run` was built from; its hash goes into every checkpoint.
      directory:   of the run: metrics.jsonl, checkpoints/, tensorboard/, translations/ are written there.
      cache_dir:   prepared data sets, shared by all runs of a sweep.
      report:      called with facts about the run as they come (for status.json).
      should_stop: asked before every step; when true, the state is saved and "stopped" is returned.
    Raises: UserError before anything is compiled; NonFiniteLoss with the step, seed and layer.
    """
    spec = run.training
    going = _Training(config, run, directory, cache_dir, report)
    report({"data": going.data.fingerprint, "steps": spec.steps, **_costs(run)})
    start, state = going.restore()
    report(going.facts(start))
    batches = going.data.train_stream(run.seeds, start)
    with _progress(run, start, progress) as bar:
        for step in range(start, spec.steps + 1):
            stopping = step < spec.steps and should_stop()
            fresh = step > start or start == 0
            if fresh and 0 < step < spec.steps and step % spec.eval_every == 0:
                going.settle(state)
                values = going.evaluate(state, step)
                bar.set_postfix(loss=f"{np.mean(values['loss']):.4f}", refresh=False)
            if fresh and step > 0 and (step % spec.checkpoint_every == 0 or step == spec.steps or stopping):
                going.settle(state)
                going.save(state, step)
            if stopping:
                going.checkpoints.wait()
                report(going.facts(step))
                return "stopped"
            if step < spec.steps:
                with going.clock("data"):
                    batch = next(batches)
                state = going.step(state, batch, step + 1)
                bar.update()
        going.finish(state)
    return "done"


def _costs(run: RunSpec) -> dict[str, Any]:
    return {
        "parameters": cost.parameters(run),
        "flops_per_token": cost.flops_per_token(run),
        "active_flops_per_token": cost.active_flops_per_token(run),
        "kv_cache_bytes_per_token": cost.kv_cache_bytes_per_token(run),
    }
