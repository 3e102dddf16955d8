"""One run among those that train together: its files, and what is booked to it."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from mha_jax.config import config_hash
from mha_jax.data import Data
from mha_jax.models import cost
from mha_jax.specs import RunSpec, UserError
from mha_jax.training import estimates, hosts
from mha_jax.training.checkpoints import Checkpoints
from mha_jax.training.evaluation import average, seed_gates
from mha_jax.training.limits import GivenUp, read_limits
from mha_jax.training.metrics import MetricsLog
from mha_jax.training.parallel import JitProgram
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


class Part:
    """A run with its directory: metrics.jsonl, checkpoints/, tensorboard/, translations/ are written there.

    Args:
      config:    the resolved config that `run` was built from; its hash goes into every checkpoint.
      report:    called with facts about the run as they come (for status.json).

    `members` is where its seeds lie on the axis R of the pack, `share` which share of the pack's time is its own, and
    `error` what it failed of.
    """

    def __init__(self, config: Any, run: RunSpec, directory: epath.Path, report: Callable[[dict[str, Any]], None]):
        self.run, self.directory, self.report = run, directory, report
        self.config_hash = config_hash(config)
        self.log = MetricsLog(directory, run.seeds)
        self.checkpoints = Checkpoints(directory / "checkpoints", keep_last=run.training.keep_last)
        self.window = Window()
        self.validation_loss: float | None = None
        self.members, self.share = slice(None), 1.0
        self.error: Exception | None = None
        self.problems: list[str] = []  # what was found damaged when it was restored
        self._limits = read_limits(directory)

    def begin(self, data: Data) -> None:
        """Puts the tokenizer's file beside the run, and tells what is known before training."""
        if data.tokenizer.path and hosts.first():
            data.tokenizer.path.copy(self.directory / data.tokenizer.path.name, overwrite=True)
        self.report(
            {
                "data": data.fingerprint,
                "steps": self.run.training.steps,
                "parameters": cost.parameters(self.run),
                "flops_per_token": cost.flops_per_token(self.run),
                "active_flops_per_token": cost.active_flops_per_token(self.run),
                "kv_cache_bytes_per_token": cost.kv_cache_bytes_per_token(self.run),
                "step_flops": estimates.step_flops(self.run),
                "update_bytes": estimates.update_bytes(self.run),
            }
        )

    def restore(self, program: JitProgram) -> tuple[int, State | None]:
        """The newest good checkpoint, or step 0 without a state; the log is cut back to it.

        Raises: UserError for checkpoints of another config, and for none where the run has no other start.
        """
        # Without a checkpoint nobody asks for the state's shapes, which take a while to find.
        restored = self.checkpoints.restore(program.abstract_state(self.run) if self.checkpoints.steps() else None)
        self.problems = list(self.checkpoints.problems)
        if restored is None and self.run.parent is not None:
            raise UserError(
                f"{self.checkpoints.directory} has no good checkpoint, and a run made out of {self.run.parent['run']} "
                "has no other start: make it again"
            )
        if restored is None:
            self.problems += self.log.rewind(-1)
            return 0, None
        if restored.metadata["config_hash"] != self.config_hash:
            raise UserError(
                f"{self.checkpoints.directory} holds checkpoints of config {restored.metadata['config_hash']}; "
                f"this run is {self.config_hash}: use another directory"
            )
        # The rows of the last step itself are those of the end, which is evaluated again.
        self.problems += self.log.rewind(restored.step, keep_evaluations=restored.step < self.run.training.steps)
        self.window = Window.from_dict(restored.metadata["window"])
        return restored.step, restored.state

    def of_pack(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Its own columns of what was found for all members."""
        return {name: np.asarray(value)[self.members] for name, value in values.items()}

    def log_window(self, number: int, metrics: dict[str, np.ndarray]) -> None:
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

    def log_validation(self, step: int, values: dict[str, np.ndarray]) -> None:
        self.validation_loss = float(np.mean(values["loss"]))
        self.log.write(step, "validation", values)
        limit = self._limits.get(step)
        if limit is not None and self.validation_loss > limit:
            self.error = GivenUp(f"validation loss {self.validation_loss:.4f} at step {step}, limit {limit:.4f}")
            self.close()

    def save(self, state: State, step: int) -> None:
        metadata = {"config_hash": self.config_hash, "window": self.window.as_dict()}
        self.checkpoints.save(step, state, metadata, metric=self.validation_loss)

    def final_params(self, program: JitProgram, state: State) -> Any:
        """What the table is computed with: the mean over the last checkpoints where averaging is asked for."""
        self.checkpoints.wait()
        steps = self.checkpoints.steps()[-self.run.training.average_last :]
        if len(steps) < 2:
            return state["params"]
        abstract = program.abstract_state(self.run)
        saved = [self.checkpoints.restore(abstract, step=step) for step in steps]
        return average([one.state["params"] for one in saved if one is not None])

    def write_translations(self, split: str, sentences: list[list[str]]) -> None:
        if not hosts.first():
            return
        folder = self.directory / "translations"
        folder.mkdir(parents=True, exist_ok=True)
        for seed, lines in zip(self.run.seeds, sentences, strict=True):
            (folder / f"{split}.seed{seed}.txt").write_text("\n".join(line.replace("\n", " ") for line in lines) + "\n")

    def write_gates(self, params: Any, constants: Any) -> None:
        gates = json.dumps(seed_gates(self.run, params, constants), indent=1)
        if hosts.first():
            (self.directory / "gates.json").write_text(gates + "\n")

    def close(self) -> None:
        self.log.close()
        self.checkpoints.close()
