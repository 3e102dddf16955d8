"""The metric against heads left: `python -m experiments.heads curve --run=DIR [--order=gradient_normalised] [--bleu]`.

Heads go in the measure's order, the least important first, a tenth of them at a time (Michel et al. 2019, figure 3);
the controls are the reversed order and random ones. All attentions together, and each kind of attention alone, with
the others whole. Heads are masked by their gates: nothing is rebuilt, and the masked model equals the removed one.

RUN/heads/curve.json: {"run", "split", "order", "orders_from", "per_layer", "by_groups", "rows"}; a row, also a line of
curve.csv, is {"kind", "order", "seed", "draw", "removed": a share, "left": heads of that kind, "loss", "accuracy",
"bleu" with --bleu}. curve.svg and curve.png show means over seeds with 95 % t intervals.
"""

import csv
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, surgery
from experiments.verbs.importance import even_batches
from mha_jax.heads.capture import Batch, kind_of
from mha_jax.heads.pruning import Scores, masked_sums, masks, removal_order
from mha_jax.heads.surgery import edit, head_shapes
from mha_jax.reporting.heads import write_page
from mha_jax.reporting.pruning import draw_curves
from mha_jax.specs import ATTENTION_KINDS, RunSpec, UserError
from mha_jax.sweeps.children import child_state
from mha_jax.sweeps.opening import OpenedRun, chosen_seeds
from mha_jax.sweeps.provenance import commit
from mha_jax.sweeps.store import write_json
from mha_jax.training.evaluation import evaluate_bleu
from mha_jax.training.parallel import JitProgram, make_program

_sums = jax.jit(masked_sums, static_argnums=0)
Row = dict[str, Any]


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    surgery.define_run(values)
    surgery.define_order(values)
    flags.DEFINE_string("eval_split", "validation", "Where the curve is measured.", flag_values=values)
    flags.DEFINE_integer("limit", None, "So many batches, evenly from it; default: all.", 1, flag_values=values)
    flags.DEFINE_integer("points", 10, "In how many steps all heads go.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("draws", 3, "How many random orders a seed.", lower_bound=1, flag_values=values)
    flags.DEFINE_list("kinds", None, "all, encoder, decoder, cross; default: all the model has.", flag_values=values)
    flags.DEFINE_bool("bleu", False, "Translate at every point too.", flag_values=values)
    flags.DEFINE_integer("sentences", None, "How many to translate; default: the split.", flag_values=values)
    cli.parse(values, argv, __doc__)
    opened = surgery.opened_run(values)
    kinds = _kinds(opened, values)
    if values.bleu and opened.run.task != "translation":
        raise UserError(f"--bleu needs a run of task 'translation', not {opened.run.task!r}")
    rows, program = [], _decoder(opened.run, values.sentences)
    for seed in chosen_seeds(opened, values.seed):
        curves = list(_curves(opened, seed, kinds, values))
        if values.bleu:
            _translate(opened, seed, program, values.eval_split, curves)
        rows += [row for curve in curves for row in curve.rows]
    _write(opened, rows, values)
    return 0


def _kinds(opened: OpenedRun, values: flags.FlagValues) -> list[str]:
    present = ATTENTION_KINDS[opened.run.task]
    known = ["all", *present] if len(present) > 1 else ["all"]
    for kind in values.kinds or ():
        if kind not in known:
            raise UserError(f"--kinds={','.join(values.kinds)} has {kind!r}; this model has {', '.join(known)}")
    return values.kinds or known


@dataclasses.dataclass
class Curve:
    """One order of one kind's heads: the rows of its points, and the masks [N, H] that stand for them."""

    rows: list[Row]
    masks: dict[str, np.ndarray]


def _curves(opened: OpenedRun, seed: int, kinds: list[str], values: flags.FlagValues) -> Iterator[Curve]:
    """Every curve of one seed, with loss and accuracy in its rows."""
    model, shapes = opened.model(seed), head_shapes(opened.run)
    batches = measured_on(opened, values.eval_split, values.limit)
    for order, draw, found in _orders(opened, seed, values):
        for kind in kinds:
            chosen = {name: score_H for name, score_H in found.items() if kind in ("all", kind_of(name))}
            units = removal_order(shapes, chosen, per_layer=values.per_layer, by_groups=values.by_groups)
            counts = [round(len(units) * i / values.points) for i in range(values.points + 1)]
            mask = masks(shapes, units, counts)
            sums = [jax.device_get(_sums(opened.run.task, model, batch, mask)) for batch in batches]
            totals = {name: np.sum([np.asarray(one[name], np.float64) for one in sums], axis=0) for name in sums[0]}
            left = np.sum([mask[name].sum(axis=1) for name in chosen], axis=0)
            yield Curve(
                [
                    {
                        "kind": kind,
                        "order": order,
                        "seed": seed,
                        "draw": draw,
                        "removed": i / values.points,
                        "left": int(left[i]),
                        "loss": float(totals["loss"][i] / totals["weight"][i]),
                        "accuracy": float(totals["correct"][i] / totals["weight"][i]),
                    }
                    for i in range(values.points + 1)
                ],
                mask,
            )


def measured_on(opened: OpenedRun, split: str, limit: int | None) -> list[Batch]:
    """The split, which may lie in order of length, or so many batches of all lengths."""
    return list(opened.batches(split)) if limit is None else even_batches(opened, split, limit)


def _orders(opened: OpenedRun, seed: int, values: flags.FlagValues) -> Iterator[tuple[str, int, Scores]]:
    """The measure, its reverse, and the random draws."""
    read = functools.partial(surgery.scores, opened, seed, split=values.split, batches=values.batches)
    if values.order != "random":
        found = read(values.order)
        yield values.order, 0, found
        yield f"reversed-{values.order}", 0, {name: -np.asarray(score_H) for name, score_H in found.items()}
    for draw in range(values.draws):
        yield "random", draw, read("random", order_seed=values.order_seed + draw)


def _translate(opened: OpenedRun, seed: int, program: JitProgram, split: str, curves: list[Curve]) -> None:
    """Puts BLEU into the rows."""
    state = child_state(opened, seed)
    for curve in curves:
        for i, row in enumerate(curve.rows):
            constants = _masked(state["constants"], {name: mask_NH[i] for name, mask_NH in curve.masks.items()})
            found, _, _ = evaluate_bleu(program, state["params"], constants, opened.data, split)
            row["bleu"] = float(found["bleu"][0])


def _decoder(run: RunSpec, sentences: int | None) -> JitProgram:
    """The program that translates with one seed's model; it serves all seeds, which share every shape."""
    decoding = dataclasses.replace(run.decoding, max_sentences=sentences or run.decoding.max_sentences)
    one = dataclasses.replace(surgery.one_seed(run, run.seeds[0]), decoding=decoding)
    return make_program(one, jax.devices()[:1])


def _masked(constants: Any, mask: Mapping[str, np.ndarray]) -> Any:
    def change(name: str) -> Any:
        return lambda part: {**part, "gate": part["gate"] * mask[name][None]} if "gate" in part else part

    return edit(constants, {name: change(name) for name in mask})


def _write(opened: OpenedRun, rows: list[Row], values: flags.FlagValues) -> None:
    folder = opened.directory.path / "heads"
    settings = {"split": values.eval_split, "order": values.order, "orders_from": values.split}
    settings |= {"per_layer": values.per_layer, "by_groups": values.by_groups}
    write_json(folder / "curve.json", {"run": opened.directory.run_id, **settings, "rows": rows})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "curve.csv").write_text(text.getvalue())
    foot = f"{opened.directory.run_id}  ·  {values.eval_split}  ·  commit {(commit() or 'none')[:12]}"
    draw_curves(rows, foot, folder)
    write_page(opened.directory.path)
    metric = "bleu" if values.bleu else "loss"
    for kind in dict.fromkeys(row["kind"] for row in rows):
        print(f"{kind}: {metric} at heads removed, mean over seeds")
        for order in dict.fromkeys(row["order"] for row in rows):
            found = [row for row in rows if (row["kind"], row["order"]) == (kind, order)]
            shares = sorted({row["removed"] for row in found})
            means = [np.mean([row[metric] for row in found if row["removed"] == share]) for share in shares]
            print(f"  {order:32}" + " ".join(f"{100 * s:.0f}%:{m:.3f}" for s, m in zip(shares, means, strict=True)))
    print(folder / "curve.svg")
