"""What each head is worth: `python -m experiments.heads importance --run=DIR/runs/NAME`.

Writes RUN/heads/importance.json, importance.csv (a row a seed and head) and importance.svg/.png (of the first seed; the
others' are importance-seedN). The JSON:

  {"run", "step", "data", "measures",
   "seeds": {SEED: {MEASURE: {"exact", "stability", "heads": {ATTENTION: {"mean", "standard_error", "p_holm"}}}}},
   "seed_stability": {MEASURE: {KIND: r}}}

Lists hold one number a head, more being more important; "stability" is Spearman's rank correlation between even and odd
batches for each kind of attention, "seed_stability" its mean over pairs of seeds. What does not exist is null.
"""

from collections.abc import Mapping

import numpy as np
from absl import flags

from experiments import cli
from mha_jax.heads.capture import Batch
from mha_jax.heads.importance import DEFAULT, check_measures, importance
from mha_jax.heads.tables import HeadTable, check_batches, seed_stability
from mha_jax.specs import UserError
from mha_jax.sweeps.opening import OpenedRun, chosen_seeds, open_run
from mha_jax.sweeps.store import write_json

Tables = dict[str, HeadTable]


def main(argv: list[str]) -> int:
    values = _parsed(argv)
    opened = open_run(values.run)
    seeds = chosen_seeds(opened, values.seed)
    batches = even_batches(opened, values.split, values.batches)
    task = opened.run.task
    found = {s: importance(task, opened.model(s), batches, values.measures, values.layers) for s in seeds}
    _write(opened, f"{values.split}, {len(batches)} batches", found)
    return 0


def even_batches(opened: OpenedRun, split: str, count: int) -> list[Batch]:
    """So many batches at even distances over a split, which may lie in order of length; all, where it has fewer.

    A batch of one example and padding is passed over: it has no spread, and no other example to resample from.
    """
    full = [number for number, batch in enumerate(opened.batches(split)) if _examples(batch) > 1]
    chosen = {full[i] for i in np.linspace(0, len(full) - 1, min(count, len(full))).round().astype(int)} if full else {}
    return [batch for number, batch in enumerate(opened.batches(split)) if number in chosen]


def _examples(batch: Batch) -> int:
    weights = np.asarray(batch["weights"])
    return int((weights.reshape(len(weights), -1).sum(axis=1) > 0).sum())


def _parsed(argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Directory of a finished run.", flag_values=values)
    flags.DEFINE_integer("seed", None, "A seed of the run; default: all.", flag_values=values)
    flags.DEFINE_string("split", "validation", "Split that is read.", flag_values=values)
    flags.DEFINE_integer("batches", 8, "Batches, taken evenly from the split.", flag_values=values)
    flags.DEFINE_list("measures", list(DEFAULT), "Measures, by name.", flag_values=values)
    flags.DEFINE_list("layers", None, "Attentions, such as encoder/0/attention; default: all.", flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.run:
        raise UserError("--run is missing: the directory of a finished run, for instance runs/default/runs/NAME")
    check_measures(values.measures)
    check_batches(values.batches)
    return values


def _write(opened: OpenedRun, source: str, found: Mapping[int, Tables]) -> None:
    from mha_jax.reporting import formats  # matplotlib takes seconds to import
    from mha_jax.reporting import importance as report
    from mha_jax.reporting.heads import write_page

    first, *_ = found
    stability = {m: seed_stability([tables[m] for tables in found.values()]) for m in found[first]}
    heads = opened.directory.path / "heads"
    record = {
        "run": opened.directory.run_id,
        "step": opened.step,
        "data": source,
        "measures": list(stability),
        "seeds": {str(seed): report.as_json(tables) for seed, tables in found.items()},
        "seed_stability": stability,
    }
    write_json(heads / "importance.json", record)
    rows = [{"run": opened.directory.run_id, "seed": s} | row for s, t in found.items() for row in report.rows(t)]
    (heads / "importance.csv").write_text(formats.rows_as_csv(rows))
    for seed, tables in found.items():
        name = "importance" if seed == first else f"importance-seed{seed}"
        report.draw(tables, name, f"{opened.directory.run_id} · step {opened.step} · seed {seed} · {source}", heads)
    print(f"{opened.directory.run_id}, seed {first} of {list(found)}, {source}\n")
    print(report.text(found[first]) + "\n")
    print(report.stability_text(found[first], stability))
    print(f"\nwritten: {heads}/importance.json, .csv, .svg, .png\npage: {write_page(opened.directory.path)}")
