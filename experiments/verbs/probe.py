"""What linear probes read out of heads: `python -m experiments.heads probe --run=DIR --treebank=TRAIN ...`.

  python -m experiments.heads probe --run=DIR --treebank=train.conllu.gz --treebank_dev=dev.conllu.gz
      --treebank_test=test.conllu.gz [--tasks=pos,relation,number,tense] [--mdl] [--seed=N] [--max_sentences=2000]

Probes are trained on the words of --treebank, their penalty is chosen on --treebank_dev, and --treebank_test scores
them, each beside a control task; --mdl also tells the length of the online code of the training labels.
Writes RUN/heads/probes.{json,csv,svg,png} (of the first seed; the others' are probes-seedN) and the page
RUN/heads/index.html; the JSON is documented in mha_jax/reporting/probes.py.
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from mha_jax.specs import UserError

if TYPE_CHECKING:
    from mha_jax.data.words import WordRows
    from mha_jax.sweeps.opening import OpenedRun

_FILES = ("treebank", "treebank_dev", "treebank_test")


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Directory of a finished run.", flag_values=values)
    flags.DEFINE_integer("seed", None, "A seed of the run; default: all.", flag_values=values)
    flags.DEFINE_string("treebank", None, "CoNLL-U file that trains probes.", flag_values=values)
    flags.DEFINE_string("treebank_dev", None, "CoNLL-U file that chooses their penalty.", flag_values=values)
    flags.DEFINE_string("treebank_test", None, "CoNLL-U file that scores them.", flag_values=values)
    flags.DEFINE_list("tasks", ["pos", "relation", "number", "tense"], "Tasks, by name.", flag_values=values)
    flags.DEFINE_bool("mdl", False, "The online code too.", flag_values=values)
    flags.DEFINE_integer("max_sentences", 2000, "Sentences of each file, at most.", 1, flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.run:
        raise UserError("--run is missing: the directory of a finished run, for instance runs/default/runs/NAME")
    for name in _FILES:
        if not values[name].value:
            raise UserError(f"--{name} is missing: probes are trained, chosen and scored on three CoNLL-U files")
    _study(values)
    return 0


def _study(values: flags.FlagValues) -> None:
    # matplotlib and JAX take seconds to import.
    from mha_jax.heads.probing import TASKS, label_words, probe_all
    from mha_jax.heads.word_features import word_features
    from mha_jax.reporting import formats
    from mha_jax.reporting import probes as reporting
    from mha_jax.reporting.heads import write_page
    from mha_jax.sweeps.opening import chosen_seeds, open_run
    from mha_jax.sweeps.store import write_json

    if not values.tasks:
        raise UserError(f"--tasks is empty; there are {', '.join(TASKS)}")
    opened = open_run(values.run)
    seeds, files = chosen_seeds(opened, values.seed), _treebanks(opened, values)
    words = [[word for sentence in rows.sentences for word in sentence.words] for rows in files.values()]
    for task in values.tasks:  # what is wrong shows before anything is computed
        label_words(task, words)
    found = {}
    for seed in seeds:
        features = [word_features(opened.model(seed), rows) for rows in files.values()]
        found[seed] = {task: probe_all(task, *features, mdl=values.mdl) for task in values.tasks}

    facts = {"run": opened.directory.run_id, "step": opened.step, **{name: values[name].value for name in _FILES}}
    told = reporting.record(found, facts | {"left_out": {path: list(rows.left_out) for path, rows in files.items()}})
    directory = opened.directory.path / "heads"
    write_json(directory / "probes.json", told)
    (directory / "probes.csv").write_text(formats.rows_as_csv(reporting.rows(told)))
    reporting.draw(told, f"{opened.directory.run_id}  ·  step {opened.step}", directory)
    for path, rows in files.items():
        if rows.left_out:
            print(f"{path}: {len(rows.left_out)} sentences are longer than {rows.length} pieces and are left out")
    print("\n".join(formats.aligned(reporting.tables(told))))
    print(f"page: {write_page(opened.directory.path)}")


def _treebanks(opened: "OpenedRun", values: flags.FlagValues) -> "dict[str, WordRows]":
    from mha_jax.data import conllu
    from mha_jax.data.words import word_rows

    length = min(opened.run.data.length, opened.run.model.max_length)
    paths = [str(values[name].value) for name in _FILES]
    tokenizer, task = opened.data.tokenizer, opened.run.task
    return {path: word_rows(conllu.read(path, values.max_sentences), tokenizer, task, length) for path in paths}
