"""What is measured: metrics.jsonl and TensorBoard files of a run, perplexity, BLEU."""

import json
import math
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mha_jax.specs import UserError
from mha_jax.training import hosts

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "heads_alive")
HIGHER_IS_BETTER = ("bleu", "accuracy")
_FIELDS = {"step": int, "seed": int, "split": str, "name": str, "value": (int, float, types.NoneType)}


class MetricsLog:
    """Appends a run's metrics to `metrics.jsonl`, and to `tensorboard/seed<k>` for each seed.

    One JSON object a line: {"step", "seed", "split", "name", "value"}. A value that is not finite is written as null.
    Of several processes the first one writes.
    """

    def __init__(self, directory: epath.PathLike, seeds: Sequence[int]) -> None:
        self.path = epath.Path(directory) / "metrics.jsonl"
        self.seeds = tuple(int(seed) for seed in seeds)
        self._tensorboard = epath.Path(directory) / "tensorboard"
        self._purge_step: int | None = None
        self._writers: dict[int, Any] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Records values of shape [R], one a seed; a scalar holds for every seed. On disk when this returns."""
        if not hosts.first():
            return
        table = {name: np.broadcast_to(np.asarray(v, np.float64), (len(self.seeds),)) for name, v in values.items()}
        lines = [
            json.dumps({"step": int(step), "seed": seed, "split": split, "name": name, "value": _json_value(column[r])})
            for name, column in table.items()
            for r, seed in enumerate(self.seeds)
        ]
        with self.path.open("a") as file:
            file.write("".join(line + "\n" for line in lines))
        for r, seed in enumerate(self.seeds):
            writer = self._writer(seed)
            for name, column in table.items():
                writer.add_scalar(f"{split}/{name}", float(column[r]), int(step))
            writer.flush()

    def rewind(self, step: int, keep_evaluations: bool = True) -> list[str]:
        """Forgets every line of a later step and every broken line, as a run resumed at `step` will write them again.

        `rewind(-1)` forgets all. Without `keep_evaluations`, of the lines of `step` itself only split "train" stays.
        TensorBoard hides the events of the forgotten steps.

        Returns: what is wrong with the broken lines, as `read_metrics` tells it.
        """
        self.close()
        self._purge_step = step + 1
        if not (hosts.first() and self.path.exists()):
            return []
        rows, broken = read_metrics(self.path)
        rows = [
            r for r in rows if r["step"] < step or (r["step"] == step and (keep_evaluations or r["split"] == "train"))
        ]
        kept = [json.dumps({**row, "value": _json_value(row["value"])}) for row in rows]
        partial = self.path.with_name(self.path.name + ".tmp")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(self.path)
        return broken

    def close(self) -> None:
        """Closes the TensorBoard files; a later write opens new ones."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, seed: int) -> Any:
        if seed not in self._writers:
            directory = self._tensorboard / f"seed{seed}"
            self._writers[seed] = _summary_writer()(str(directory), purge_step=self._purge_step)
        return self._writers[seed]


def _summary_writer() -> Any:
    """tensorboardX's writer. It imports torch where that is installed, for two seconds, and has no use for it here."""
    hidden = sys.modules.setdefault("torch", None) is None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter  # here, so that reading metrics does not pay for it
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


def _json_value(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def read_metrics(path: epath.PathLike) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a metrics.jsonl and what is wrong with it: every corrupt line, named by its number.

    A null value reads as nan. A file that does not exist yet has no rows and nothing wrong.
    """
    path = epath.Path(path)
    rows, problems = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            problems.append(f"{path}: line {number} is corrupt: {line[:60].decode(errors='replace')!r}")
        else:
            rows.append(row)
    return rows, problems


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # both JSONDecodeError and UnicodeDecodeError
        return None
    if not isinstance(row, dict) or any(not isinstance(row.get(k, ...), kind) for k, kind in _FIELDS.items()):
        return None
    return {**row, "value": math.nan if row["value"] is None else float(row["value"])}


def lower_is_better(metric: str) -> bool:
    """The direction of "validation/loss" and the like. Raises UserError for a metric whose direction is not known."""
    name = metric.rsplit("/", 1)[-1]
    if name not in LOWER_IS_BETTER + HIGHER_IS_BETTER:
        raise UserError(
            f"metric {metric!r} has no direction; known are {', '.join(LOWER_IS_BETTER + HIGHER_IS_BETTER)}"
        )
    return name in LOWER_IS_BETTER


def perplexity(loss: Any) -> np.ndarray:
    """exp(loss), for a loss in nats a token; inf where that overflows float64."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(np.asarray(loss, np.float64)))


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU (0 to 100) of detokenised lines and the sacreBLEU signature that says how it was computed.

    Raises: ValueError if there are not as many hypotheses as references.
    """
    from sacrebleu.metrics.bleu import BLEU  # here, as only translation needs it

    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses do not pair with {len(references)} references")
    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return float(score.score), str(metric.get_signature())
