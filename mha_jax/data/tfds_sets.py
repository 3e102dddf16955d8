"""Any TFDS set of texts, translations or labelled texts by its name; prepared as ArrayRecord, it needs no TensorFlow.

A set that was prepared elsewhere with file_format="array_record" is found under `data.data_dir`. Importing this file
imports tensorflow_datasets.
"""

import contextlib
import difflib
import io
from collections.abc import Callable, Iterator
from typing import Any

import requests
import tensorflow_datasets as tfds
import tensorflow_datasets.text  # TFDS knows the builders of a family once it is imported
import tensorflow_datasets.translate
from absl import logging
from etils import epath
from tensorflow_datasets.core.download import downloader

from mha_jax.data.datasets import Corpus, Example, Split
from mha_jax.data.files import SPLITS
from mha_jax.specs import DataSpec, UserError

Decode = Callable[[dict[str, Any]], Example]


def open_named(spec: DataSpec, task: str, cache_dir: epath.Path) -> Corpus:
    """Downloads and prepares `spec.tfds_name` where `cache_dir` has not got it, and opens its splits.

    Raises: UserError for a name that TFDS does not know (with the nearest), a set whose features do not fit the task,
        no network, and a set that cannot be prepared without TensorFlow.
    """
    name = str(spec.tfds_name)
    with _quiet():
        builder = _builder(name, cache_dir)
        decode = _decoder(builder, spec, task)  # before the download: a set that does not fit costs nothing
        _prepare(builder, name)
        sources = {split: builder.as_data_source(split=found) for split, found in _split_names(builder).items()}
    splits = {split: Split(source, decode, range(len(source))) for split, source in sources.items()}
    if task == "classification":  # some test sets keep their labels to themselves: all are -1
        splits = {split: rows for split, rows in splits.items() if len(rows) and rows[0].label >= 0}
    if "train" not in splits:
        raise UserError(
            f"data.tfds_name={name!r} has no train split with labels; it has {', '.join(builder.info.splits)}"
        )
    return Corpus(f"tfds:{builder.info.full_name}", splits)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS warns of every folder that it is about to make."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _needs_tensorflow(name: str) -> UserError:
    return UserError(
        f"data.tfds_name={name!r} cannot be prepared without TensorFlow: pip install tensorflow, or prepare it "
        "elsewhere with file_format='array_record' and set data.data_dir to its directory"
    )


def _builder(name: str, cache_dir: epath.Path) -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where TFDS prints a banner if TensorFlow is missing
            return tfds.builder(name, data_dir=cache_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        family = name.split("/")[0].split(":")[0]
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(f"data.tfds_name={name!r} is not known to TFDS{_nearest(family, known)}") from None
    except ImportError:
        raise _needs_tensorflow(name) from None
    except (ValueError, AssertionError) as error:  # an unknown config or version of a known set
        family, _, variant = name.partition("/")
        configs = list(getattr(tfds.builder_cls(family.split(":")[0]), "builder_configs", {}))
        if variant and variant.split(":")[0] not in configs:
            raise UserError(f"TFDS set {family!r} has no config {variant!r}{_nearest(variant, configs)}") from None
        raise UserError(f"data.tfds_name={name!r}: {str(error).splitlines()[0]}") from None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; nearest are {', '.join(near)}" if near else ""


def _prepare(builder: Any, name: str) -> None:
    downloader.MAX_RETRIES = 0  # TFDS has no setting for it, and its ten retries take minutes to say "no network"
    try:
        builder.download_and_prepare()
    except (requests.exceptions.RequestException, downloader.download_utils_lib.DownloadError) as error:
        reason = "no network" if isinstance(error, requests.exceptions.ConnectionError) else str(error).splitlines()[0]
        raise UserError(
            f"data.tfds_name={name!r} cannot be downloaded ({reason}); set data.data_dir to a directory that has it "
            "prepared, or use data.source='text' or 'parallel' with files, or 'embedded'"
        ) from None
    except ImportError as error:
        if "tensorflow" not in str(error).lower():
            raise
        raise _needs_tensorflow(name) from None


def _split_names(builder: Any) -> dict[str, str]:
    """The set's own split for each of ours: the one of that name, else the shortest that begins with it."""
    own = list(builder.info.splits)
    alike = {split: sorted((name for name in own if name.startswith(split)), key=len) for split in SPLITS}
    return {split: names[0] for split, names in alike.items() if names}


def _decoder(builder: Any, spec: DataSpec, task: str) -> Decode:
    """How a record becomes an example, from the types of the features and not from their names."""
    features = builder.info.features
    if task == "translation":
        return _pair_decoder(features, builder.info.supervised_keys, spec)
    named = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    texts = [name for name, feature in named.items() if isinstance(feature, tfds.features.Text)]
    given = (builder.info.supervised_keys or ("",))[0]
    texts = [given] if given in texts else texts
    labels = {name: feature for name, feature in named.items() if isinstance(feature, tfds.features.ClassLabel)}
    if isinstance(features, tfds.features.Translation) or not texts or (task == "classification" and len(labels) != 1):
        wanted = "texts" if task in ("lm", "masked_lm") else "texts and one class label"
        own = ", ".join(named)
        raise UserError(f"data.tfds_name={spec.tfds_name!r} does not fit task={task!r}: it has {own}, not {wanted}")

    def text(record: dict[str, Any]) -> str:
        return "\n".join(record[name].decode(errors="replace") for name in texts)

    if task in ("lm", "masked_lm"):
        return lambda record: Example((text(record),))
    ((label, classes),) = labels.items()
    if classes.num_classes != spec.num_classes:
        raise UserError(f"data.num_classes={spec.num_classes}; {spec.tfds_name!r} has {classes.num_classes}")
    return lambda record: Example((text(record),), int(record[label]))


def _pair_decoder(features: Any, supervised_keys: Any, spec: DataSpec) -> Decode:
    if not isinstance(features, tfds.features.Translation):
        raise UserError(f"data.tfds_name={spec.tfds_name!r} does not fit task='translation': it is no translation set")
    own = tuple(supervised_keys or features.languages)
    source, target = spec.languages or own
    for language in (source, target):
        if language not in own:
            raise UserError(f"data.languages names {language!r}; {spec.tfds_name!r} has {' and '.join(map(repr, own))}")
    return lambda record: Example(
        (record[source].decode(errors="replace"), record[target].decode(errors="replace")),
    )
