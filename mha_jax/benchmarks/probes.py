"""Probes of all heads of a model as one batched problem, beside one scikit-learn probe of one head."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.benchmarks.rounds import paired_ratio, summary
from mha_jax.benchmarks.tables import markdown
from mha_jax.heads.linear_probes import train_probes
from mha_jax.specs import UserError

OURS, THEIRS = "all heads, one batched problem", "one head, scikit-learn"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: logistic regression on made-up features of every head, standardised, with labels as frequent as
    1/rank. Both sides have the same penalty."""

    heads: int = 144
    width: int = 64
    words: int = 20_000
    test_words: int = 10_000
    classes: int = 17
    rounds: int = 3


def features(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [H, N, V] of training and test words, and their labels [N]."""
    rng = np.random.default_rng(0)
    words, shape = setting.words + setting.test_words, (setting.width, setting.width)
    share = 1 / np.arange(1, setting.classes + 1)
    label_N = rng.choice(setting.classes, words, p=share / share.sum())
    x_HNV = rng.standard_normal((setting.heads, words, setting.width), np.float32)
    for x_NV in x_HNV:
        means_CV = 0.25 * rng.standard_normal((setting.classes, setting.width), np.float32)
        x_NV += means_CV[label_N]
        x_NV[:] = x_NV @ (
            rng.standard_normal(shape, np.float32) / setting.width**0.5 + np.eye(setting.width, dtype=np.float32)
        )
        train_NV = x_NV[: setting.words]
        x_NV[:] = (x_NV - train_NV.mean(axis=0)) / train_NV.std(axis=0)
    return x_HNV, label_N


def measure(setting: Setting) -> dict[str, Any]:
    """Times both in turns.

    Returns: "rows", one a side: its name, "seconds" of every round, and "over", its time over scikit-learn's, round by
    round; "accuracy" of head 0 on the test words, and "answers", the share on which both agree.
    Raises:  UserError where scikit-learn is not there.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("bench probes needs scikit-learn: pip install -r requirements-bench.txt") from None
    x_HNV, label_N = features(setting)
    train, test = slice(setting.words), slice(setting.words, None)
    ours = jnp.asarray(x_HNV[:, train]), jnp.asarray(label_N[None, train]), jnp.array([1 / setting.words])
    theirs = x_HNV[0, train], label_N[train]
    contestants = {
        OURS: lambda: jax.block_until_ready(train_probes(*ours, classes=setting.classes)),
        THEIRS: lambda: LogisticRegression(C=1.0, max_iter=1000).fit(*theirs),
    }
    seconds = _in_turns(contestants, setting.rounds)
    kernel, bias = (np.asarray(leaf[0]) for leaf in contestants[OURS]())
    own = (x_HNV[0, test] @ kernel[:, 0, 0] + bias[0, 0]).argmax(axis=1)
    other = contestants[THEIRS]().predict(x_HNV[0, test])
    return {
        "accuracy": {name: float((x == label_N[test]).mean()) for name, x in ((OURS, own), (THEIRS, other))},
        "answers": float((own == other).mean()),
        "rows": [
            {"way": name, "seconds": values, "over": paired_ratio(values, seconds[THEIRS])}
            for name, values in seconds.items()
        ],
    }


def _in_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, in turns; of calls that take seconds one goes before, which compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in sorted(contestants, reverse=number % 2 == 1):
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def table(result: dict[str, Any]) -> str:
    """One row a side, and the standard error of an accuracy under it."""

    def spread(values: dict[str, float]) -> str:
        return f"{values['median']:.2f} ({values['min']:.2f}-{values['max']:.2f})"

    rows = [
        [row["way"], spread(summary(row["seconds"])), spread(row["over"]), f"{result['accuracy'][row['way']]:.4f}"]
        for row in result["rows"]
    ]
    setting, share = result["setting"], result["accuracy"][THEIRS]
    error = (share * (1 - share) / setting["test_words"]) ** 0.5
    return markdown(["probes", "seconds", "over scikit-learn", "accuracy of head 0"], rows) + (
        f"\n\n{setting['heads']} heads of width {setting['width']}, {setting['words']} words, {setting['classes']} "
        f"classes; accuracy on {setting['test_words']} other words, standard error {error:.4f}; both give the same "
        f"answer to {100 * result['answers']:.1f} % of them."
    )
