"""What linear probes read out of heads: `python -m experiments.heads probe --run=DIR --treebank=TRAIN ...`.

  python -m experiments.heads probe --run=DIR --treebank=train.conllu.gz --treebank_dev=dev.conllu.gz
      --treebank_test=test.conllu.gz [--tasks=pos,relation,number,tense] [--graph] [--mdl] [--seed=N]
      [--max_sentences=2000] [--labels=train.tsv --labels_dev=dev.tsv --labels_test=test.tsv]

Probes are trained on the words of --treebank, their penalty is chosen on --treebank_dev, and --treebank_test scores
them, each beside a control task; --mdl also tells the length of the online code of the training labels. --graph adds a
parser that weighs all attention maps, beside right-branching, the best offset and the best head. --labels adds a task
"label" about whole sentences, or takes the place of the treebanks: lines of a label, a tab and a text, as in
data.source="labelled", so that a classifier's own files will do.
What a model that is all but untrained has of all this: the same command on a run of the same config with
training.steps=1, eval_every=1 and checkpoint_every=1, whose one step is that of the warm-up.

Writes RUN/heads/probes.{json,csv,svg,png} (of the first seed; the others' are probes-seedN) and the page
RUN/heads/index.html; the JSON is documented in mha_jax/reporting/probes.py.
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from mha_jax.specs import UserError

if TYPE_CHECKING:
    from mha_jax.data.conllu import Sentence
    from mha_jax.data.words import WordRows
    from mha_jax.heads.graph_probe import GraphFound
    from mha_jax.models.transformer import Model
    from mha_jax.sweeps.opening import OpenedRun

_TREEBANKS = ("treebank", "treebank_dev", "treebank_test")
_LABELS = ("labels", "labels_dev", "labels_test")


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Directory of a finished run.", flag_values=values)
    flags.DEFINE_integer("seed", None, "A seed of the run; default: all.", flag_values=values)
    flags.DEFINE_string("treebank", None, "CoNLL-U file that trains probes.", flag_values=values)
    flags.DEFINE_string("treebank_dev", None, "CoNLL-U file that chooses their penalty.", flag_values=values)
    flags.DEFINE_string("treebank_test", None, "CoNLL-U file that scores them.", flag_values=values)
    flags.DEFINE_list("tasks", ["pos", "relation", "number", "tense"], "Tasks, by name.", flag_values=values)
    flags.DEFINE_bool("graph", False, "The attention-graph probe too.", flag_values=values)
    flags.DEFINE_bool("mdl", False, "The online code too.", flag_values=values)
    flags.DEFINE_string("labels", None, "Labelled texts that train probes of sentences.", flag_values=values)
    flags.DEFINE_string("labels_dev", None, "Labelled texts that choose their penalty.", flag_values=values)
    flags.DEFINE_string("labels_test", None, "Labelled texts that score them.", flag_values=values)
    flags.DEFINE_integer("max_sentences", 2000, "Sentences of each file, at most.", 1, flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.run:
        raise UserError("--run is missing: the directory of a finished run, for instance runs/default/runs/NAME")
    labels = any(values[name].value for name in _LABELS)
    treebanks = not labels or any(values[name].value for name in _TREEBANKS)
    for name in (*_TREEBANKS * treebanks, *_LABELS * labels):
        if not values[name].value:
            what = "CoNLL-U files" if name in _TREEBANKS else "files of labelled texts"
            raise UserError(f"--{name} is missing: probes are trained, chosen and scored on three {what}")
    if values.graph and not treebanks:
        raise UserError("--graph needs --treebank, --treebank_dev and --treebank_test")
    _study(values, treebanks, labels)
    return 0


def _study(values: flags.FlagValues, treebanks: bool, labels: bool) -> None:
    # matplotlib and JAX take seconds to import.
    from mha_jax.heads.probing import TASKS, label_words, probe_all
    from mha_jax.heads.sentence_labels import label_sentences, probe_sentences
    from mha_jax.heads.word_features import word_features
    from mha_jax.reporting import formats
    from mha_jax.reporting import probes as reporting
    from mha_jax.reporting.heads import write_page
    from mha_jax.sweeps.opening import chosen_seeds, open_run
    from mha_jax.sweeps.store import write_json

    if treebanks and not values.tasks:
        raise UserError(f"--tasks is empty; there are {', '.join(TASKS)}")
    opened = open_run(values.run)
    seeds = chosen_seeds(opened, values.seed)
    tasks = values.tasks if treebanks else []
    # What is wrong shows before anything is computed.
    files = _rows(opened, _read_treebanks(values)) if treebanks else []
    words = [[word for sentence in rows.sentences for word in sentence.words] for rows in files]
    for task in tasks:
        label_words(task, words)
    texts, named = _read_labels(values) if labels else ([], [])
    labelled = _rows(opened, texts)
    if labels:
        label_sentences([rows.sentences for rows in labelled], named)

    found, graphs = {}, {}
    for seed in seeds:
        model = opened.model(seed)
        features = [word_features(model, rows) for rows in files]
        found[seed] = {task: probe_all(task, *features, mdl=values.mdl) for task in tasks}
        if labels:
            of_texts = [word_features(model, rows) for rows in labelled]
            found[seed]["label"] = probe_sentences(of_texts, named, values.mdl)
        if values.graph:
            graphs[seed] = _graph(model, files[0], files[2])

    paths = {name: str(values[name].value) for name in (*_TREEBANKS * treebanks, *_LABELS * labels)}
    read = dict(zip(paths.values(), (*files, *labelled), strict=True))
    facts = {"run": opened.directory.run_id, "step": opened.step, **paths}
    told = reporting.record(
        found, graphs, facts | {"left_out": {path: list(rows.left_out) for path, rows in read.items()}}
    )
    directory = opened.directory.path / "heads"
    write_json(directory / "probes.json", told)
    (directory / "probes.csv").write_text(formats.rows_as_csv(reporting.rows(told)))
    reporting.draw(told, f"{opened.directory.run_id}  ·  step {opened.step}", directory)
    for path, rows in read.items():
        if rows.left_out:
            print(f"{path}: {len(rows.left_out)} sentences are longer than {rows.length} pieces and are left out")
    print("\n".join(formats.aligned(reporting.tables(told))))
    print(f"page: {write_page(opened.directory.path)}")


def _read_treebanks(values: flags.FlagValues) -> "list[list[Sentence]]":
    from mha_jax.data import conllu

    return [conllu.read(str(values[name].value), values.max_sentences) for name in _TREEBANKS]


def _read_labels(values: flags.FlagValues) -> "tuple[list[list[Sentence]], list[dict[str, str]]]":
    """The texts of the three files as sentences, and the label of each by its name."""
    from mha_jax.data import files
    from mha_jax.heads.sentence_labels import text_sentences

    splits = ("train", "validation", "test")
    paths = {split: str(values[name].value) for split, name in zip(splits, _LABELS, strict=True)}
    _, lines = files.labelled(paths)
    read = [text_sentences(lines[split][: values.max_sentences]) for split in splits]
    return [sentences for sentences, _ in read], [named for _, named in read]


def _rows(opened: "OpenedRun", files: "list[list[Sentence]]") -> "list[WordRows]":
    from mha_jax.data.words import word_rows

    length = min(opened.run.data.length, opened.run.model.max_length)
    return [word_rows(sentences, opened.data.tokenizer, opened.run.task, length) for sentences in files]


def _graph(model: "Model", train: "WordRows", test: "WordRows") -> "GraphFound":
    from mha_jax.heads.capture import attentions
    from mha_jax.heads.graph_probe import graph_probe, graphs
    from mha_jax.heads.similarity import Head
    from mha_jax.heads.treebank_maps import word_maps
    from mha_jax.heads.word_features import probed

    layers = attentions(model)
    heads = [Head(name, i) for name in probed(model, train.task) for i in range(layers[name].shape.num_heads)]
    first, second = (graphs((one.sentences, one.weights) for one in word_maps(model, rows)) for rows in (train, test))
    return graph_probe(heads, list(first), second)
