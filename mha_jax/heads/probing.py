"""What linear probes read out of every head, each beside a control task, and how short a code they make.

A control task gives each word type a random label, drawn from the labels' own shares: what a probe gets right there it
has learnt by heart. Selectivity is the accuracy on the task less that on its control (Hewitt and Liang 2019).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.data.conllu import Word
from mha_jax.heads.intervals import Estimate
from mha_jax.heads.linear_probes import Probes, train_probes
from mha_jax.heads.word_features import WordFeatures
from mha_jax.specs import UserError

# What each task asks of a word; None where the word is none of the task's.
TASKS: dict[str, Callable[[Word], str | None]] = {
    "pos": lambda word: word.upos,
    "relation": lambda word: word.relation,
    "number": lambda word: word.feats.get("Number"),
    "tense": lambda word: word.feats.get("Tense"),
}
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
# Shares of the words after which the online code trains anew (Voita and Titov 2020, section 3.2).
PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
_DRAWS = 1000
_FLOATS = 2**26  # of the scores that are held at a time


class Labels(NamedTuple):
    """A task on one file: which words it asks about, their class (-1: none of the training words had it), and the
    class by the control task."""

    words: np.ndarray
    label: np.ndarray
    control: np.ndarray


class Scores(NamedTuple):
    """Probes of H heads on the test words. `low` and `high` are of the accuracy, by the bootstrap over sentences.

    `l2` is the penalty that was best on the dev words; `selectivity` has an interval from the same draws. `bits`
    is the length of the online code of the training labels, None where it was not asked for.
    """

    accuracy: Estimate
    control: np.ndarray
    selectivity: Estimate
    l2: np.ndarray
    bits: np.ndarray | None


class Split(NamedTuple):
    """What one file has for one task: features [H, N, V], classes [2, N] by the task and its control, sentences [N]."""

    x_HNV: np.ndarray
    labels_2N: np.ndarray
    sentence: np.ndarray


def label_words(task: str, files: Sequence[Sequence[Word]], seed: int = 0) -> tuple[tuple[str, ...], list[Labels]]:
    """The classes of a task, those that the first file has, and the labels of every file.

    The control's label of a word form is the same in every file, and a function of the seed.

    Raises: UserError for a task that does not exist; where the first file has fewer than two classes, or another none.
    """
    if task not in TASKS:
        raise UserError(f"there is no probing task {task!r}; there are {', '.join(TASKS)}")
    asked = [[(i, word.form, TASKS[task](word)) for i, word in enumerate(words)] for words in files]
    return number_labels(
        task, [[(i, form, label) for i, form, label in part if label is not None] for part in asked], seed
    )


def number_labels(
    task: str, asked: Sequence[Sequence[tuple[int, str, str]]], seed: int
) -> tuple[tuple[str, ...], list[Labels]]:
    """The classes of the first file and the labels of every one, from (place, form, label) of what is asked about.

    Raises: UserError where the first file has fewer than two classes, or another none.
    """
    classes, counts = np.unique([label for _, _, label in asked[0]], return_counts=True)
    if len(classes) < 2 or not all(asked):
        raise UserError(f"task {task} needs two classes to train on, and examples to choose and to score on")
    numbers = {name: i for i, name in enumerate(classes.tolist())}
    forms = sorted({form for part in asked for _, form, _ in part})
    drawn = np.random.default_rng(seed).choice(len(classes), len(forms), p=counts / counts.sum())
    control = dict(zip(forms, drawn.tolist(), strict=True))
    columns = [
        (
            [i for i, _, _ in part],
            [numbers.get(label, -1) for _, _, label in part],
            [control[form] for _, form, _ in part],
        )
        for part in asked
    ]
    return tuple(numbers), [Labels(*(np.array(column, int) for column in part)) for part in columns]


def majority(train: Labels, test: Labels) -> float:
    """Accuracy of always answering what is most frequent among the training words."""
    return float((test.label == np.bincount(train.label).argmax()).mean())


def split(features: WordFeatures, x_NHV: np.ndarray, labels: Labels) -> Split:
    """The task's part of features [N, H, V]."""
    x_HNV = np.ascontiguousarray(x_NHV[labels.words].transpose(1, 0, 2))
    return Split(x_HNV, np.stack([labels.label, labels.control]), features.sentence[labels.words])


def probe(train: Split, dev: Split, test: Split, classes: int, mdl: bool = False) -> Scores:
    """Trains on one split, chooses the penalty of each head and task on the second, and scores on the third."""
    probes = train_probes(train.x_HNV, train.labels_2N, jnp.array(PENALTIES), classes=classes)
    chosen_2H = _right(probes, dev).mean(axis=1).argmax(axis=1)
    right_2NH = np.take_along_axis(_right(probes, test), chosen_2H[:, None, None], axis=2)[:, :, 0].astype(float)
    (own_NH, control_NH), l2_H = right_2NH, np.array(PENALTIES)[chosen_2H[0]]
    bits = online_code(train, classes, l2_H) if mdl else None
    accuracy, selectivity = (bootstrap(x_NH, test.sentence) for x_NH in (own_NH, own_NH - control_NH))
    return Scores(accuracy, control_NH.mean(axis=0), selectivity, l2_H, bits)


def _right(probes: Probes, part: Split) -> np.ndarray:
    """Whether each probe is right about each word, bool [2, N, R, H]."""
    words = part.x_HNV.shape[1]
    chunks = np.array_split(np.arange(words), -(-words * probes.bias_HLRC.size // _FLOATS))
    answers_HN2R = np.concatenate([_argmax(probes, jnp.asarray(part.x_HNV[:, rows])) for rows in chunks], axis=1)
    return answers_HN2R.transpose(2, 1, 3, 0) == part.labels_2N[:, :, None, None]


@jax.jit
def _argmax(probes: Probes, x_HNV: jax.Array) -> jax.Array:
    return probes.logits(x_HNV).argmax(axis=-1)


def bootstrap(x_NH: np.ndarray, sentence_N: np.ndarray, seed: int = 0) -> Estimate:
    """The mean over words and its 95 % interval, by drawing sentences with replacement."""
    _, number_N = np.unique(sentence_N, return_inverse=True)
    sentences = number_N.max() + 1
    sums_SH = np.zeros((sentences, x_NH.shape[1]))
    np.add.at(sums_SH, number_N, x_NH)
    words_S = np.bincount(number_N)
    drawn = np.random.default_rng(seed).multinomial(sentences, np.full(sentences, 1 / sentences), _DRAWS)
    means = (drawn @ sums_SH) / (drawn @ words_S)[:, None]
    return Estimate(x_NH.mean(axis=0), *np.percentile(means, [2.5, 97.5], axis=0))


def online_code(train: Split, classes: int, l2_H: np.ndarray) -> np.ndarray:
    """Bits [H] in which the training labels can be told to one who has the features (Voita and Titov 2020, equation 3).

    The first portion of the words, in random order, costs log2(classes) bits a label; each further one what the probe
    that was trained on all before gives it. A uniform code has N log2(classes) bits.
    """
    heads, words, _ = train.x_HNV.shape
    order = np.random.default_rng(0).permutation(words)
    ends = np.unique([max(1, round(portion * words)) for portion in PORTIONS])
    penalties, column_H = np.unique(l2_H, return_inverse=True)
    bits_H = np.full(heads, ends[0] * np.log2(classes))
    for end, after in itertools.pairwise(ends):
        seen, coming = order[:end], order[end:after]
        labels = train.labels_2N[:1, seen]
        probes = train_probes(train.x_HNV[:, seen], labels, jnp.asarray(penalties), classes=classes)
        for rows in np.array_split(coming, -(-len(coming) * probes.bias_HLRC.size // _FLOATS)):
            told_HNR = _log2(probes, jnp.asarray(train.x_HNV[:, rows]), jnp.asarray(train.labels_2N[0, rows]))
            bits_H -= np.asarray(told_HNR, np.float64).sum(axis=1)[np.arange(heads), column_H]
    return bits_H


@jax.jit
def _log2(probes: Probes, x_HNV: jax.Array, label_N: jax.Array) -> jax.Array:
    told = jax.nn.log_softmax(probes.logits(x_HNV)[:, :, 0], axis=-1) / np.log(2)
    return jnp.take_along_axis(told, label_N[None, :, None, None], axis=-1)[..., 0]


class TaskFound(NamedTuple):
    """One task: its classes, words (or sentences) to train, choose and score on, the accuracy of the most frequent
    class, and the probes of the embedding layer (as one head) and of every attention's heads."""

    classes: tuple[str, ...]
    words: tuple[int, ...]
    majority: float
    embedding: Scores
    heads: dict[str, Scores]


def probe_all(task: str, train: WordFeatures, dev: WordFeatures, test: WordFeatures, mdl: bool = False) -> TaskFound:
    """One task by all heads of all attentions, and by the embedding layer.

    Raises: UserError as `label_words` does.
    """
    classes, labels = label_words(task, [one.words for one in (train, dev, test)])
    return probe_labelled(classes, labels, (train, dev, test), mdl)


def probe_labelled(
    classes: Sequence[str], labels: Sequence[Labels], files: Sequence[WordFeatures], mdl: bool = False
) -> TaskFound:
    """As `probe_all`, from the labels of the three files. Attentions with heads of one width are trained together."""
    found: dict[str, Scores] = {}
    for names in _same_width(files[0].heads):
        joined = [np.concatenate([one.heads[name] for name in names], axis=1) for one in files]
        parts = [split(*each) for each in zip(files, joined, labels, strict=True)]
        scores = probe(parts[0], parts[1], parts[2], len(classes), mdl)
        counts = [files[0].heads[name].shape[1] for name in names]
        found |= dict(zip(names, _parted(scores, counts), strict=True))
    parts = [split(one, one.embedding[:, None], own) for one, own in zip(files, labels, strict=True)]
    embedding = probe(parts[0], parts[1], parts[2], len(classes), mdl)
    words = tuple(len(own.words) for own in labels)
    heads = {name: found[name] for name in files[0].heads}
    return TaskFound(tuple(classes), words, majority(labels[0], labels[2]), embedding, heads)


def _same_width(heads: Mapping[str, np.ndarray]) -> list[list[str]]:
    widths = dict.fromkeys(x.shape[2] for x in heads.values())
    return [[name for name, x in heads.items() if x.shape[2] == width] for width in widths]


def _parted(scores: Scores, counts: Sequence[int]) -> Iterator[Scores]:
    """The scores of each of several attentions, whose heads stand one after the other."""
    start = 0
    for count in counts:
        own = slice(start, start + count)
        yield jax.tree.map(lambda x, own=own: x[own], scores)
        start += count
