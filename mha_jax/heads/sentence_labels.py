"""Probes of a label per sentence: a head's vector of a sentence is the mean of its words'."""

from collections.abc import Mapping, Sequence

import numpy as np

from mha_jax.data.conllu import Sentence, Word
from mha_jax.heads.probing import Labels, TaskFound, number_labels, probe_labelled
from mha_jax.heads.word_features import WordFeatures

Named = Mapping[str, str]  # the label of each sentence by its name


def text_sentences(lines: Sequence[tuple[str, str]]) -> tuple[list[Sentence], dict[str, str]]:
    """(label, text) of each line as a sentence, whose words are what spaces part, and the labels by sentence."""
    sentences = []
    for number, (_, text) in enumerate(lines, 1):
        forms = enumerate(text.split())
        words = tuple(Word(form, "_", "_", {}, -1, "_", {}, space_before=place > 0) for place, form in forms)
        sentences.append(Sentence(f"line {number}", words))
    return sentences, {one.name: label for one, (label, _) in zip(sentences, lines, strict=True)}


def label_sentences(
    files: Sequence[Sequence[Sentence]], named: Sequence[Named], seed: int = 0
) -> tuple[tuple[str, ...], list[Labels]]:
    """The classes, and the labels of every file's sentences.

    By the control task each text has a random label, drawn from the labels' own shares. No sentence tells another's, so
    it controls for less than that of words does: what a probe gets right of it follows from the shares of the classes,
    from sentences that occur again, and from chance.

    Raises: UserError as `number_labels` does.
    """
    asked = [
        [(i, " ".join(word.form for word in one.words), labels[one.name]) for i, one in enumerate(sentences)]
        for sentences, labels in zip(files, named, strict=True)
    ]
    return number_labels("label", asked, seed)


def probe_sentences(files: Sequence[WordFeatures], named: Sequence[Named], mdl: bool = False) -> TaskFound:
    """As `probing.probe_all`, from the features of three files and their labels."""
    classes, labels = label_sentences([one.sentences for one in files], named)
    return probe_labelled(classes, labels, [sentence_means(one) for one in files], mdl)


def sentence_means(features: WordFeatures) -> WordFeatures:
    """A vector a sentence, the mean of its words'; it has no words of its own."""
    _, starts, counts = np.unique(features.sentence, return_index=True, return_counts=True)

    def means(x_NV: np.ndarray) -> np.ndarray:
        counted = counts.reshape(-1, *(1 for _ in x_NV.shape[1:]))
        return (np.add.reduceat(x_NV, starts, axis=0) / counted).astype(np.float32)

    heads = {name: means(x) for name, x in features.heads.items()}
    return WordFeatures(heads, means(features.embedding), (), np.arange(len(starts)), features.sentences)
