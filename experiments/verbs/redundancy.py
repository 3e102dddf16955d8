"""Which heads do the same: clusters, matchings, and a list of heads to prune or merge with its effect on the loss.

  python -m experiments.heads redundancy --run=DIR [--other=DIR] [--seed=N] [--split=validation] [--batches=4]
      [--measure=js|cka|angles|weights|all] [--cut=DISTANCE]

Of 2 * batches, taken evenly from the split, every other one finds heads that are alike, and the rest measure the loss
without them. Heads are those of the first seed (or --seed), matched with those of the other seeds and of --other, a run
on the same data. Suggestions come from linear CKA, or from the one measure that is named. Writes
RUN/heads/redundancy.{json,csv,svg,png} and the page RUN/heads/index.html; the JSON is documented in
mha_jax/reporting/redundancy.py.
"""

import csv
import io
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from mha_jax.specs import UserError

if TYPE_CHECKING:
    from mha_jax.sweeps.opening import OpenedRun


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Directory of a finished run.", flag_values=values)
    flags.DEFINE_string("other", None, "Another run on the same data, to match heads with.", flag_values=values)
    flags.DEFINE_integer(
        "seed", None, "A seed of the run; default: the first, matched with the rest.", flag_values=values
    )
    flags.DEFINE_string("split", "validation", "Whose batches are read.", flag_values=values)
    flags.DEFINE_integer("batches", 4, "Batches that compare, and as many that measure.", flag_values=values)
    flags.DEFINE_string("measure", "all", "js, cka, angles, weights or all.", flag_values=values)
    flags.DEFINE_float(
        "cut", None, "Distance up to which heads count as alike; default by measure.", flag_values=values
    )
    cli.parse(values, argv, __doc__)
    if not values.run:
        raise UserError("--run is missing: the directory of a finished run, for instance runs/default/runs/NAME")
    if values.batches < 2:
        raise UserError(f"--batches={values.batches} gives no error bar; give at least 2")
    if values.cut is not None and not 0 <= values.cut <= 1:
        raise UserError(f"--cut={values.cut:g} is no distance between heads; it goes from 0 to 1")

    _study(values)
    return 0


def _study(values: flags.FlagValues) -> None:
    # matplotlib and JAX take seconds to import.
    from experiments.verbs.importance import even_batches
    from mha_jax.heads.matching import match_layers, match_models
    from mha_jax.heads.redundancy import CUTS, find_twins, measure_effects, written_grams
    from mha_jax.heads.similarity import MEASURES, compare
    from mha_jax.reporting import redundancy as reporting
    from mha_jax.reporting.heads import write_page
    from mha_jax.sweeps.opening import chosen_seeds, open_run
    from mha_jax.sweeps.store import write_json

    measures = tuple(MEASURES) if values.measure == "all" else (values.measure,)
    found_by = "cka" if values.measure == "all" else values.measure
    if found_by not in MEASURES:
        raise UserError(f"--measure={values.measure} is unknown; known are {', '.join(MEASURES)} and all")
    cuts = {measure: CUTS[measure] for measure in measures}
    cuts[found_by] = CUTS[found_by] if values.cut is None else values.cut

    opened = open_run(values.run)
    other = None if values.other is None else open_run(values.other)
    seed, *seeds = chosen_seeds(opened, values.seed)
    model, run_id = opened.model(seed), opened.directory.run_id
    others = {f"seed {s}": opened.model(s) for s in seeds}
    if other is not None:
        _check_same_data(opened, other)
        others[f"{other.directory.run_id} seed {other.run.seeds[0]}"] = other.model(other.run.seeds[0])
    batches = even_batches(opened, values.split, 2 * values.batches)
    held_out = len(batches) >= 4
    first, second = (batches[::2], batches[1::2]) if held_out else (batches, batches)

    found = compare(model, first, measures)
    if not found:
        raise UserError(f"run {run_id} has no heads to compare")
    within = {str(seed): reporting.within_layers(found, found_by)}
    for one in seeds:
        within[str(one)] = reporting.within_layers(compare(opened.model(one), first, (found_by,)), found_by)
    grams = written_grams(model, first)
    twins = [one for pairs in found.values() for one in find_twins(pairs[found_by], grams, cuts[found_by])]
    measured = measure_effects(opened.run.task, model, second, sorted(twins, key=lambda one: one.distance))
    matched = [*match_layers(found), *match_models(f"seed {seed}", model, others, first, measures)]

    facts = {"run": run_id, "seed": seed, "step": opened.step, "split": values.split, "found_by": found_by}
    facts |= {
        "other": values.other,
        "batches": [len(first), len(second)],
        "held_out": held_out,
        "within_layers": within,
    }
    told = reporting.record(found, cuts, measured, matched, facts)
    directory = opened.directory.path / "heads"
    write_json(directory / "redundancy.json", told)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(reporting.rows(found))
    (directory / "redundancy.csv").write_text(text.getvalue())
    reporting.draw(found, cuts, f"{run_id}  ·  seed {seed}  ·  {values.split}, {len(first)} batches", directory)
    print("\n".join(reporting.lines(told)))
    print(f"page: {write_page(opened.directory.path)}")


def _check_same_data(opened: "OpenedRun", other: "OpenedRun") -> None:
    """Heads of two runs are compared on the same tokens."""
    sides = [
        (one.run.task, one.data.fingerprint["sha256"], one.data.fingerprint.get("tokenizer_sha256"))
        for one in (opened, other)
    ]
    if sides[0] != sides[1]:
        raise UserError(
            f"runs {opened.directory.run_id} and {other.directory.run_id} were not made from the same data; "
            "--other needs a run with the same task, texts and tokenizer"
        )
