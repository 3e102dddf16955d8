"""Makes a run of a checkpoint: `python -m experiments.heads import --from=M.bin --tokenizer=T.bin --workdir=DIR`.

Read are llama2.c's checkpoints (version 0) with its tokenizer.bin. The run, DIR/runs/NAME-HASH, is like any that has
been trained to its end, for one step: `heads importance`, `prune` and the others take it, and what is pruned trains on.
Its optimiser state is fresh. Its data is --text, of which a quarter each is the validation and the test split; without
--text it is DIR/texts/NAME.txt, 256 texts that the model itself wrote (drawn token by token, seed 0): on these the loss
says how sure the model is of itself, and differences of losses what a head adds to that, not how well it fits a corpus.
"""

from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from configs import default
from experiments import cli
from mha_jax import config as configs
from mha_jax.data.pieces import PieceTokenizer
from mha_jax.pretrained import llama2c
from mha_jax.specs import UserError
from mha_jax.sweeps import imported
from mha_jax.training.metrics import read_metrics

_TEXTS = 256


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("from", None, "The checkpoint.", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "Its tokenizer.bin.", flag_values=values)
    flags.DEFINE_string("text", None, "A text file to look into its heads with.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where the run goes to.", flag_values=values)
    flags.DEFINE_integer("length", 256, "Tokens a row of the data; at most the model's positions.", flag_values=values)
    cli.parse(values, argv, __doc__)
    source, tokenizer_file, workdir = (_given(values, name) for name in ("from", "tokenizer", "workdir"))
    checkpoint = llama2c.read(source)
    tokenizer = PieceTokenizer(tokenizer_file, checkpoint.sizes["vocab_size"])
    text = epath.Path(values.text) if values.text else workdir / "texts" / f"{source.stem}.txt"
    config = _config(source, checkpoint, tokenizer, text, values.length)
    if not values.text and not text.exists():
        written = imported.own_texts(configs.resolve(config), checkpoint.params, tokenizer, _TEXTS)
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n\n".join(written) + "\n")
    directory = imported.write_imported(workdir, config, checkpoint.params)
    rows = read_metrics(directory.path / "metrics.jsonl")[0]
    (loss,) = [row["value"] for row in rows if (row["split"], row["name"]) == ("validation", "loss")]
    print(f"{directory.path}: {checkpoint.sizes}, {loss:.4f} nats a token on the validation split of {text}")
    return 0


def _given(values: flags.FlagValues, name: str) -> epath.Path:
    value: Any = values[name].value
    if not value:
        raise UserError(f"--{name} is missing")
    return epath.Path(value)


def _config(
    source: epath.Path, checkpoint: llama2c.Llama2c, tokenizer: PieceTokenizer, text: epath.Path, length: int
) -> ConfigDict:
    """One seed, one step that has been taken; further training goes on gently, with llama2.c's other constants."""
    values: dict[str, Any] = {f"model.{name}": value for name, value in checkpoint.model.items()}
    values |= {"name": source.stem, "seeds": (0,), "parent": imported.origin(source)}
    values |= {"data.source": "text", "data.files.train": str(text), "data.validation_fraction": 0.25}
    values |= {"data.length": length, "data.tokenizer": tokenizer.name, "data.tokenizer_file": str(tokenizer.path)}
    values |= {"data.vocab_size": tokenizer.vocab_size, "training.steps": 1}
    values |= {"optimizer.schedule": "constant", "optimizer.learning_rate": 2e-4, "optimizer.weight_decay": 0.1}
    values |= {"optimizer.beta2": 0.95, "optimizer.epsilon": 1e-8, "optimizer.clip_norm": 1.0}
    return configs.override(default.get_config(), values)
