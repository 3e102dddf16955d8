"""TFDS builders of the sets that we make ourselves, stored as ArrayRecord so that nothing needs TensorFlow.

Importing this file imports tensorflow_datasets: do so only when a set has to be prepared or read.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from mha_jax.data import embedded, files


class EmbeddedCorpus(tfds.core.GeneratorBasedBuilder):
    """Help topics and docstrings of the Python standard library: {"text"}."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # The order of the documents is part of the corpus.
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _documents(self) -> Mapping[str, list[str]]:
        return embedded.documents()

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(texts) for split, texts in self._documents().items()}

    def _generate_examples(self, texts: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
        for key, text in enumerate(texts):
            yield key, {"text": text}


class TextFiles(EmbeddedCorpus):
    """The documents of text files that the user names: {"text"}."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, paths: Mapping[str, Any], **kwargs: Any):
        self._paths = paths
        super().__init__(**kwargs)

    def _documents(self) -> Mapping[str, list[str]]:
        return files.documents(self._paths)


class LabelledFiles(tfds.core.GeneratorBasedBuilder):
    """Lines with a label each: {"text", "label"}."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, paths: Mapping[str, Any], **kwargs: Any):
        self.labels, self._lines = files.labelled(paths)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=self.labels)
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(lines) for split, lines in self._lines.items()}

    def _generate_examples(self, lines: Iterable[tuple[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
        for key, (label, text) in enumerate(lines):
            yield key, {"text": text, "label": label}


class ParallelFiles(tfds.core.GeneratorBasedBuilder):
    """Matching lines of two files: {"source", "target"}."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, paths: Mapping[str, Any], **kwargs: Any):
        self._paths = paths
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.Translation(languages=("source", "target")),
            supervised_keys=("source", "target"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(pairs) for split, pairs in files.pairs(self._paths).items()}

    def _generate_examples(self, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
        for key, (source, target) in enumerate(pairs):
            yield key, {"source": source, "target": target}
