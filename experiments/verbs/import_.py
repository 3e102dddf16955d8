"""Makes a run of a checkpoint: `python -m experiments.heads import --from=DIR --workdir=DIR [--text=FILE]`.

Read are directories with config.json and safetensors files, BERT's, GPT-2's and llama's, and llama2.c's checkpoints
(a file, version 0). The tokenizer is --tokenizer: tokenizer.json, GPT-2's vocab.json beside merges.txt, BERT's
vocab.txt or llama2.c's tokenizer.bin; without, the first of them in the directory.

The run, DIR/runs/NAME-HASH, is like any that has been trained to its end, for one step: `heads importance`, `prune` and
the others take it, and what is pruned trains on. Its optimiser state is fresh. Its data is --text, of which a quarter
each is the validation and the test split; for a classifier its lines are a label, a tab and a text. A language model
without --text gets DIR/texts/NAME.txt, 256 texts that it wrote itself (drawn token by token, seed 0): on these the loss
says how sure the model is of itself, and differences of losses what a head adds to that, not how well it fits a corpus.

RUN/import.json says how far each layer is from a float64 forward pass of the file's own tensors, on four rows of the
validation split, and under "notes" what is not as in the file: a head that an encoder had not, the order of classes.
"""

import json
import tempfile
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from configs import default
from experiments import cli
from mha_jax import config as configs
from mha_jax.data import files, vocabularies
from mha_jax.data.pieces import PieceTokenizer
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.data.vocabularies import FileTokenizer
from mha_jax.pretrained import families, llama2c
from mha_jax.pretrained.agreement import agreement
from mha_jax.specs import UserError
from mha_jax.sweeps import imported
from mha_jax.sweeps.opening import open_run
from mha_jax.training.metrics import read_metrics

_TEXTS, _ROWS, _LENGTH = 256, 4, 256
_KINDS = {"tokenizer.json": "json", "vocab.json": "gpt2", "vocab.txt": "wordpiece", "tokenizer.bin": "llama2c"}
_BY_SUFFIX = {".json": "json", ".txt": "wordpiece", ".bin": "llama2c"}
Checkpoint = families.Checkpoint | llama2c.Llama2c


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("from", None, "The checkpoint.", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "Its tokenizer, where it is not beside it.", flag_values=values)
    flags.DEFINE_string("text", None, "A text file to look into its heads with.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where the run goes to.", flag_values=values)
    flags.DEFINE_integer(
        "length",
        None,
        f"Tokens a row of the data; default: the model's positions, at most {_LENGTH}.",
        flag_values=values,
    )
    cli.parse(values, argv, __doc__)
    source = _given(values, "from")
    kind, file = _tokenizer_file(source, values.tokenizer)
    workdir = _given(values, "workdir")
    checkpoint = families.read(source) if source.is_dir() else llama2c.read(source)
    tokenizer = _tokenizer(kind, file, checkpoint.vocab_size)
    text = epath.Path(values.text) if values.text else workdir / "texts" / f"{source.stem}.txt"
    if isinstance(checkpoint, families.Checkpoint) and checkpoint.labels and values.text:
        known, _ = files.labelled({"train": str(text)})
        checkpoint = families.relabelled(checkpoint, known)
    length = values.length or min(checkpoint.model["max_length"], _LENGTH)
    config = _config(source, checkpoint, (kind, file), text, length)
    if not values.text and not text.exists():
        if checkpoint.task != "lm":
            raise UserError(f"--text is missing: a model of task={checkpoint.task!r} cannot write its own")
        written = imported.own_texts(configs.resolve(config), checkpoint.params, tokenizer, _TEXTS)
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n\n".join(written) + "\n")
    directory = imported.write_imported(workdir, config, checkpoint.params)
    rows = read_metrics(directory.path / "metrics.jsonl")[0]
    (loss,) = [row["value"] for row in rows if (row["split"], row["name"]) == ("validation", "loss")]
    print(f"{directory.path}: {checkpoint.about}, {loss:.4f} nats a target on the validation split of {text}")
    _report(directory.path, checkpoint)
    return 0


def _given(values: flags.FlagValues, name: str) -> epath.Path:
    value: Any = values[name].value
    if not value:
        raise UserError(f"--{name} is missing")
    return epath.Path(value)


def _tokenizer_file(source: epath.Path, given: str | None) -> tuple[str, epath.Path]:
    """The kind of the tokenizer and its file. Raises: UserError where none is given and none lies there."""
    if given:
        file = epath.Path(given)
        kind = _KINDS.get(file.name, _BY_SUFFIX.get(file.suffix))
        if kind is None:
            raise UserError(f"--tokenizer={given} must be one of {', '.join(_KINDS)}, or end with .json, .txt or .bin")
        return kind, file
    for name, kind in _KINDS.items():
        if source.is_dir() and (source / name).exists():
            return kind, source / name
    raise UserError(f"--tokenizer is missing, and {source} holds none of {', '.join(_KINDS)}")


def _tokenizer(kind: str, file: epath.Path, vocab_size: int) -> Tokenizer:
    """Raises: UserError for a tokenizer that does not have as many tokens as the checkpoint."""
    if kind == "llama2c":
        return PieceTokenizer(file, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        made = epath.Path(folder) / "tokenizer.json"
        made.write_text(vocabularies.as_json(kind, str(file)))
        return FileTokenizer(kind, made, vocab_size)


def _config(
    source: epath.Path, checkpoint: Checkpoint, tokenizer: tuple[str, epath.Path], text: epath.Path, length: int
) -> ConfigDict:
    """One seed, one step that has been taken; further training goes on gently, with llama2.c's other constants."""
    values: dict[str, Any] = {f"model.{name}": value for name, value in checkpoint.model.items()}
    values |= {"name": source.stem, "task": checkpoint.task, "seeds": (0,), "parent": imported.origin(source)}
    values |= {
        "data.source": "labelled" if checkpoint.labels else "text",
        "data.num_classes": len(checkpoint.labels) if checkpoint.labels else None,
    }
    values |= {"data.files.train": str(text), "data.validation_fraction": 0.25, "data.length": length}
    values |= {"data.tokenizer": tokenizer[0], "data.tokenizer_file": str(tokenizer[1])}
    values |= {"data.vocab_size": checkpoint.vocab_size, "training.steps": 1}
    values |= {"optimizer.schedule": "constant", "optimizer.learning_rate": 2e-4, "optimizer.weight_decay": 0.1}
    values |= {"optimizer.beta2": 0.95, "optimizer.epsilon": 1e-8, "optimizer.clip_norm": 1.0}
    return configs.override(default.get_config(), values)


def _report(path: epath.Path, checkpoint: Checkpoint) -> None:
    """Compares the run, as it is read back, with the file, and writes import.json."""
    opened = open_run(path)
    batch: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in next(opened.batches()).items()}
    tokens_BT = batch["inputs"][:_ROWS]
    lengths = batch["lengths"][:_ROWS] if "lengths" in batch else [tokens_BT.shape[1]] * len(tokens_BT)
    rows = [tokens[:length] for tokens, length in zip(tokens_BT, lengths, strict=True) if length]
    model: Any = opened.model(0)  # of one stack, as the tasks of checkpoints are
    found = agreement(checkpoint, model, rows)
    told = {**opened.config["parent"], "notes": checkpoint.notes, "agreement": found}
    (path / "import.json").write_text(json.dumps(told, indent=1) + "\n")
    for note in checkpoint.notes:
        print(f"note: {note}")
    print(
        f"apart from a float64 forward pass by at most {max(found['layers']):.1e} in {len(found['layers']) - 1} layers "
        f"and {found['logits']:.1e} in the logits ({found['tokens']} tokens): {path / 'import.json'}"
    )
