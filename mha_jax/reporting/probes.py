"""What probes read out of heads as a record for JSON, as rows, as tables, and as heat maps of layers by heads."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from mha_jax.heads.capture import kind_of, layer_of
from mha_jax.heads.graph_probe import GraphFound
from mha_jax.heads.intervals import Estimate
from mha_jax.heads.probing import Scores, TaskFound
from mha_jax.reporting.canvas import OURS, PAGE, STYLE, panels, save

_COLOURS = LinearSegmentedColormap.from_list("probes", [PAGE, OURS, "#12365f"])
_COLUMNS = ("accuracy", "low", "high", "control", "selectivity", "selectivity_low", "selectivity_high", "l2")


def record(
    found: Mapping[int, Mapping[str, TaskFound]], graphs: Mapping[int, GraphFound], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What probes.json holds.

    facts   "run", "step", "treebank", "treebank_dev", "treebank_test", "labels", "labels_dev", "labels_test" (those
            that were given), "left_out": {file: names of sentences}
    seeds   {SEED: {"tasks": {TASK: {"classes": [...], "words": {"train", "dev", "test"}, "majority": accuracy of the
            most frequent class, "embedding": SCORES of one head, the token embeddings, "heads": {ATTENTION: SCORES}}},
            "graph": GRAPH, null without --graph}}
            The task "label" is that of --labels; its "words" are sentences.

    SCORES is {"accuracy", "low", "high", "control", "selectivity", "selectivity_low", "selectivity_high", "l2",
    "bits"}: lists of one number a head. Intervals are 95 %, by the bootstrap over test sentences; "bits" is the online
    code of the training labels, null without --mdl; a uniform code has words.train * log2(classes).

    GRAPH is {"probe", "right_branching", "best_offset", "best_head", "over_head", "over_right"}, each {"mean", "low",
    "high"}: unlabelled attachment scores, and what the probe is above two of them; "offset", "head" and "direction" of
    the best; "words": {"train", "test"}; "w" and "u": {ATTENTION: [...]}, the weights. See heads/graph_probe.py.
    """
    seeds = {
        str(seed): {
            "tasks": {task: _task(one) for task, one in by_task.items()},
            "graph": _graph(graphs[seed]) if seed in graphs else None,
        }
        for seed, by_task in found.items()
    }
    return {**facts, "seeds": seeds}


def _graph(found: GraphFound) -> dict[str, Any]:
    estimates = {name: one for name, one in found._asdict().items() if isinstance(one, Estimate)}
    return {
        **{name: {part: round(float(x), 6) for part, x in one._asdict().items()} for name, one in estimates.items()},
        "offset": found.offset,
        "head": str(found.head),
        "direction": found.direction,
        "words": dict(zip(("train", "test"), found.words, strict=True)),
        "w": {name: [round(float(x), 4) for x in weights] for name, weights in found.w.items()},
        "u": {name: [round(float(x), 4) for x in weights] for name, weights in found.u.items()},
    }


def _task(found: TaskFound) -> dict[str, Any]:
    return {
        "classes": list(found.classes),
        "words": dict(zip(("train", "dev", "test"), found.words, strict=True)),
        "majority": found.majority,
        "embedding": _scores(found.embedding),
        "heads": {name: _scores(scores) for name, scores in found.heads.items()},
    }


def _scores(scores: Scores) -> dict[str, list[float] | None]:
    columns = (*scores.accuracy, scores.control, *scores.selectivity, scores.l2)
    listed = {name: [round(float(x), 6) for x in column] for name, column in zip(_COLUMNS, columns, strict=True)}
    return {**listed, "bits": None if scores.bits is None else [round(float(x), 1) for x in scores.bits]}


def rows(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of probes.csv: one a seed, task and head."""
    return [
        {"run": told["run"], "seed": seed, "task": task, "kind": kind_of(name), "layer": layer_of(name), "head": head}
        | {column: values[head] for column, values in scores.items() if values is not None}
        for seed, one in told["seeds"].items()
        for task, own in one["tasks"].items()
        for name, scores in own["heads"].items()
        for head in range(len(scores["accuracy"]))
    ]


def tables(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tables for the page and the terminal: {"caption", "columns", "rows"}."""
    found = []
    for seed, one in told["seeds"].items():
        for task, own in one["tasks"].items():
            best = _best(own["heads"], "accuracy")
            selective = _best(own["heads"], "selectivity")
            found.append(
                [seed, task, str(len(own["classes"])), str(own["words"]["test"]), _percent(own["majority"]),
                 _interval(own["embedding"], 0, "accuracy"), f"{best[0]}:{best[1]}",
                 _interval(own["heads"][best[0]], best[1], "accuracy"), f"{selective[0]}:{selective[1]}",
                 _interval(own["heads"][selective[0]], selective[1], "selectivity")]
            )  # fmt: skip
    yield {
        "caption": "Accuracy of linear probes, in percent, of the most frequent class, of the token embeddings and of "
        "the best head; and the head that is most selective: its accuracy less that of a control task, in which every "
        "word form (or sentence) has a random label. Heads are the best on these very sentences. Intervals are 95 %, "
        "over sentences.",
        "columns": ["seed", "task", "classes", "scored", "majority", "embedding", "best head", "accuracy",
                    "most selective", "selectivity"],
        "rows": found,
    }  # fmt: skip
    codes = list(_codes(told))
    if codes:
        yield {
            "caption": "Online code of the training labels, in bits a label: of the head with the shortest, of the "
            "token embeddings, and of labels without any features (uniform). Shorter is easier to read out.",
            "columns": ["seed", "task", "labels", "uniform", "embedding", "shortest of", "its bits", "times shorter"],
            "rows": codes,
        }
    graphs = {seed: one["graph"] for seed, one in told["seeds"].items() if one.get("graph")}
    if graphs:
        yield {
            "caption": "A parser of all attention maps, weighed by two trained numbers a head: how many words, in "
            "percent, are given the word that they depend on; roots and punctuation are not scored. Right-branching "
            "takes the next word; offset and head are the best of the training sentences. Intervals are 95 %, over "
            "sentences.",
            "columns": ["seed", "words", "all maps", "right-branching", "best offset", "best head", "of it",
                        "all above head"],
            "rows": [_graph_row(seed, one) for seed, one in graphs.items()],
        }  # fmt: skip


def _codes(told: Mapping[str, Any]) -> Iterator[list[str]]:
    for seed, one in told["seeds"].items():
        for task, own in one["tasks"].items():
            if own["embedding"]["bits"] is not None:
                labels = own["words"]["train"]
                name, head = _best(own["heads"], "bits", min)
                uniform, *bits = (
                    np.log2(len(own["classes"])),
                    own["embedding"]["bits"][0],
                    own["heads"][name]["bits"][head],
                )
                embedding, shortest = (x / labels for x in bits)
                yield [seed, task, str(labels), f"{uniform:.2f}", f"{embedding:.2f}", f"{name}:{head}",
                       f"{shortest:.2f}", f"{uniform / shortest:.2f}"]  # fmt: skip


def _graph_row(seed: str, one: Mapping[str, Any]) -> list[str]:
    probe, right, offset, head, over = (
        f"{_percent(x['mean'])} ({_percent(x['low'])} to {_percent(x['high'])})"
        for x in (one[part] for part in ("probe", "right_branching", "best_offset", "best_head", "over_head"))
    )
    whose = f"{one['head']}, {one['direction']} attends"
    return [seed, str(one["words"]["test"]), probe, right, f"{one['offset']:+d}: {offset}", whose, head, over]


def _best(heads: Mapping[str, Any], column: str, choose: Callable[..., Any] = max) -> tuple[str, int]:
    """The attention and head with the highest value, or the lowest by min."""
    return choose(((name, head) for name, one in heads.items() for head in range(len(one[column]))),
                  key=lambda place: heads[place[0]][column][place[1]])  # fmt: skip


def _interval(scores: Mapping[str, Any], head: int, column: str) -> str:
    ends = ("low", "high") if column == "accuracy" else ("selectivity_low", "selectivity_high")
    mean, low, high = (_percent(scores[part][head]) for part in (column, *ends))
    return f"{mean} ({low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def draw(told: Mapping[str, Any], foot: str, directory: epath.Path) -> None:
    """Writes probes.svg and .png of the first seed, probes-seedN of the others: accuracy and selectivity by layer and
    head, a row of panels a task."""
    for number, (seed, one) in enumerate(told["seeds"].items()):
        with mpl.rc_context({**STYLE, "axes.grid": False}):
            layers = max(len(own["heads"]) for own in one["tasks"].values())
            figure, axes = panels(len(one["tasks"]), 2, 0.5 + len(one["tasks"]) * (0.8 + 0.2 * layers))
            for i, (task, own) in enumerate(one["tasks"].items()):
                facts = f"majority {_percent(own['majority'])}, embedding {_percent(own['embedding']['accuracy'][0])}"
                for j, (column, about) in enumerate((("accuracy", facts), ("selectivity", "accuracy less control"))):
                    _panel(axes[i, j], own["heads"], column)
                    axes[i, j].set_title(f"{task} · {column}, % · {about}", fontsize=8)
                axes[i, 0].set_ylabel("layer")
            for axis in axes[-1]:
                axis.set_xlabel("head")
            save(figure, "probes" if number == 0 else f"probes-seed{seed}", f"{foot}  ·  seed {seed}", directory)


def _panel(axis: Axes, heads: Mapping[str, Any], column: str) -> None:
    widest = max(len(one[column]) for one in heads.values())
    grid = np.full((len(heads), widest), np.nan)
    for row, one in zip(grid, heads.values(), strict=True):
        row[: len(one[column])] = one[column]
    image = axis.imshow(100 * grid, cmap=_COLOURS, aspect="auto")
    axis.figure.colorbar(image, ax=axis, pad=0.02).ax.tick_params(labelsize=7)
    axis.set_xticks(range(0, widest, 1 + widest // 17))
    axis.set_yticks(range(len(heads)), [str(layer_of(name)) for name in heads])
    axis.tick_params(length=0, labelsize=7)
