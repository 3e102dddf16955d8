"""Named tensors of chosen heads: `python -m experiments.heads capture --run=DIR/runs/NAME --what=weights,head_output`.

Writes RUN/heads/capture/TEXT.npz, a file a text, which numpy.load opens: arrays "ATTENTION/WHAT", float32, with axes
[h, T, S] for logits, weights and weights_after_dropout, [T, h, V] for head_output and [T, h, D] for
head_output_residual; padding is left out. RUN/heads/capture/capture.json has

  {"run", "seed", "step", "split", "what", "layers", "heads": list or null for all, "dropout_seed",
   "texts": [{"file", "name", "tokens": {"encoder" or "decoder": [...]}, "shapes": {array: [...]}}]}
"""

import functools
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, texts
from mha_jax.heads.capture import chosen_layers, kind_of
from mha_jax.heads.examples import Example
from mha_jax.heads.tensors import WHATS, capture
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError
from mha_jax.sweeps.opening import chosen_seeds, open_run
from mha_jax.sweeps.store import write_json


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    texts.define(values, "Attentions, such as encoder/0/attention; default: all.")
    flags.DEFINE_list("what", ["weights"], f"Tensors: {', '.join(WHATS)}.", flag_values=values)
    flags.DEFINE_integer("dropout_seed", None, "Dropout as in training, by this seed.", flag_values=values)
    cli.parse(values, argv, __doc__)
    texts.check(values)
    for what in values.what:
        if what not in WHATS:
            raise UserError(f"--what has {what!r}; there are {', '.join(WHATS)}")
    _write(values)
    return 0


def _write(values: flags.FlagValues) -> None:
    from mha_jax.reporting.heads import write_page  # matplotlib takes seconds to import

    opened = open_run(values.run)
    seed = chosen_seeds(opened, values.seed)[0]
    model, heads = opened.model(seed), texts.numbers(values, "heads")
    layers, those = chosen_layers(model, values.layers), texts.examples(opened, model, values)
    key = None if values.dropout_seed is None else jax.random.key(values.dropout_seed)
    look = functools.partial(_captured, what=tuple(values.what), layers=tuple(layers), heads=heads and tuple(heads))
    found = [_arrays(one, look(model, one.batch, key)) for one in those]
    directory, told = opened.directory.path / "heads" / "capture", []
    directory.mkdir(parents=True, exist_ok=True)
    for one, arrays in zip(those, found, strict=True):
        file = f"{one.name.replace(' ', '-')}.npz"
        with (directory / file).open("wb") as out:
            np.savez(out, **arrays)  # pyright: ignore[reportArgumentType]
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        told.append({"file": file, "name": one.name, "tokens": one.tokens, "shapes": shapes})
        print(f"{directory / file}: {len(arrays)} arrays, {sum(x.nbytes for x in arrays.values()) / 2**20:.1f} MB")
    facts = {"run": opened.directory.run_id, "seed": seed, "step": opened.step}
    facts["split"] = values.split if values.text is None and values.source is None else None
    facts |= {"what": values.what, "layers": layers, "heads": heads, "dropout_seed": values.dropout_seed}
    write_json(directory / "capture.json", {**facts, "texts": told})
    print(f"tokens and shapes: {directory / 'capture.json'}\npage: {write_page(opened.directory.path)}")


@functools.partial(jax.jit, static_argnames=("what", "layers", "heads"))
def _captured(
    model: Model, batch: Any, key: Any, what: tuple[str, ...], layers: tuple[str, ...], heads: tuple[int, ...] | None
) -> Any:
    keys = None if key is None else key[None]
    return capture(model, batch, what, layers=layers, heads=heads, dropout_keys=keys)


def _arrays(example: Example, found: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """{"ATTENTION/WHAT": array} of the one example, without its padding."""
    arrays = {}
    for attention, tensors in found.items():
        queries, keys = map(len, example.sides(kind_of(attention)))
        for what, tensor in tensors.items():
            square = what in ("logits", "weights", "weights_after_dropout")
            place = np.s_[0, :, :queries, :keys] if square else np.s_[0, :queries]
            arrays[f"{attention}/{what}"] = np.asarray(tensor)[place]
    return arrays
