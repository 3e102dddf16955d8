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
from mha_jax.cores import num_cores
from mha_jax.heads.linear_probes import train_probes
from mha_jax.specs import UserError

OURS, ONE_THREAD, ALL_THREADS = "all heads, one batched problem", "one head, scikit-learn", "the same, threads as given"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: logistic regression on made-up features of every head, standardised. Word types are as frequent
    as 1/rank and bring one of the classes, those again as frequent as 1/rank; one word in ten has another. Features are
    correlated and classes overlap. Both sides have the same penalty; `compared` heads are scored on both."""

    heads: int = 144
    width: int = 64
    words: int = 20_000
    test_words: int = 10_000
    classes: int = 17
    compared: int = 8
    rounds: int = 3


def features(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [H, N, V] of training and test words, and their labels [N]."""
    rng = np.random.default_rng(0)
    words, width, types = setting.words + setting.test_words, setting.width, setting.words // 5

    def drawn(choices: int, count: int) -> np.ndarray:
        share = 1 / np.arange(1, choices + 1)
        return rng.choice(choices, count, p=share / share.sum())

    type_N = drawn(types, words)
    label_N = np.where(rng.random(words) < 0.1, drawn(setting.classes, words), drawn(setting.classes, types)[type_N])
    spread_V = np.arange(1, width + 1) ** -0.7  # of the principal components
    x_HNV = np.empty((setting.heads, words, width), np.float32)
    for x_NV in x_HNV:
        class_CV, type_TV = (rng.standard_normal((count, width)) for count in (setting.classes, types))
        turned_VV = np.linalg.qr(rng.standard_normal((width, width)))[0]
        x_NV[:] = rng.standard_normal((words, width), np.float32) + (0.25 * class_CV)[label_N] + (0.7 * type_TV)[type_N]
        x_NV[:] = x_NV @ (spread_V[:, None] * turned_VV).astype(np.float32)
        train_NV = x_NV[: setting.words]
        x_NV[:] = (x_NV - train_NV.mean(axis=0)) / train_NV.std(axis=0)
    return x_HNV, label_N


def measure(setting: Setting) -> dict[str, Any]:
    """Times them in turns. scikit-learn is timed with one BLAS thread, and with as many as it takes by itself.

    Returns: "rows", one a way: its name, "seconds" of every round, and "over", its time over scikit-learn's with one
    thread, round by round; "threads" each way may use; "accuracy" {way: [compared]} of the first heads on the test
    words; "answers", the share on which both agree; and scikit-learn's "iterations" on head 0.
    Raises:  UserError where scikit-learn is not there.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
        from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("bench probes needs scikit-learn: pip install -r requirements-bench.txt") from None
    x_HNV, label_N = features(setting)
    train, test = slice(setting.words), slice(setting.words, None)
    ours = jnp.asarray(x_HNV[:, train]), jnp.asarray(label_N[None, train]), jnp.array([1 / setting.words])

    def theirs(head: int, threads: int | None = 1) -> Any:
        with threadpool_limits(threads):
            return LogisticRegression(C=1.0, max_iter=1000).fit(x_HNV[head, train], label_N[train])

    contestants = {
        OURS: lambda: jax.block_until_ready(train_probes(*ours, classes=setting.classes)),
        ONE_THREAD: lambda: theirs(0),
        ALL_THREADS: lambda: theirs(0, None),
    }
    seconds = _in_turns(contestants, setting.rounds)
    kernel_HVC, bias_HC = (np.asarray(leaf)[..., 0, 0, :] for leaf in contestants[OURS]())
    fitted = [theirs(head) for head in range(min(setting.compared, setting.heads))]
    own = [(x_HNV[i, test] @ kernel_HVC[i] + bias_HC[i]).argmax(axis=1) for i in range(len(fitted))]
    other = [one.predict(x_HNV[i, test]) for i, one in enumerate(fitted)]
    answers = {OURS: np.stack(own), ONE_THREAD: np.stack(other)}
    return {
        "accuracy": {name: (x == label_N[test]).mean(axis=1).tolist() for name, x in answers.items()},
        "answers": float((answers[OURS] == answers[ONE_THREAD]).mean()),
        "iterations": int(fitted[0].n_iter_[0]),
        "threads": {OURS: num_cores(), ONE_THREAD: 1, ALL_THREADS: num_cores()},
        "rows": [
            {"way": name, "seconds": values, "over": paired_ratio(values, seconds[ONE_THREAD])}
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
    """One row a way, and the standard error of an accuracy under it."""

    def spread(values: dict[str, float]) -> str:
        return f"{values['median']:.2f} ({values['min']:.2f}-{values['max']:.2f})"

    setting, accuracy = result["setting"], {way: np.mean(x) for way, x in result["accuracy"].items()}
    rows = [
        [row["way"], str(result["threads"][row["way"]]), spread(summary(row["seconds"])), spread(row["over"]),
         f"{accuracy[row['way']]:.4f}" if row["way"] in accuracy else "the same"]
        for row in result["rows"]
    ]  # fmt: skip
    share = accuracy[ONE_THREAD]
    error = (share * (1 - share) / setting["test_words"]) ** 0.5
    heads = len(result["accuracy"][OURS])
    return markdown(["probes", "threads", "seconds", "over scikit-learn", "accuracy"], rows) + (
        f"\n\n{setting['heads']} heads of width {setting['width']}, {setting['words']} words, {setting['classes']} "
        f"classes; {result['iterations']} iterations of scikit-learn. Accuracy is the mean of {heads} heads on "
        f"{setting['test_words']} other words, standard error of one {error:.4f}; both give the same answer to "
        f"{100 * result['answers']:.1f} % of them."
    )
