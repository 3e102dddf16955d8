"""Writes a run's model as a checkpoint: `python -m experiments.heads export --run=DIR/runs/NAME --out=DIR`.

DIR gets config.json and model.safetensors of the family that the model belongs to, bert, gpt2 or llama, and the run's
tokenizer. Where layers have heads of their own, as after pruning, config.json holds them under mha_jax.heads: `heads
import` reads such a checkpoint, other libraries do not. A gate that is not 1 is multiplied into the head's `out`.
"""

from typing import Any

import numpy as np
from absl import flags
from etils import epath

from experiments import cli, surgery
from mha_jax.heads.surgery import edit, head_shapes
from mha_jax.pretrained import directory, families
from mha_jax.specs import UserError
from mha_jax.sweeps.opening import OpenedRun, chosen_seeds


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "The run's directory.", flag_values=values)
    flags.DEFINE_integer("seed", None, "Which seed; default: its only one.", flag_values=values)
    flags.DEFINE_string("out", None, "The directory to write.", flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.out:
        raise UserError("--out is missing")
    opened, out = surgery.opened_run(values), epath.Path(values.out)
    seed, *others = chosen_seeds(opened, values.seed)
    if others:
        raise UserError(f"--seed is missing: the run has the seeds {seed}, {', '.join(map(str, others))}")
    if opened.run.gates.kind != "none":
        raise UserError(f"gates.kind={opened.run.gates.kind!r}: prune the run with --closed first, then export that")
    labels = opened.data.fingerprint.get("labels") if opened.run.task == "classification" else None
    config, tensors = families.written(opened.run, _ungated(opened, seed), labels)
    directory.write(out, config, tensors)
    for name in ("tokenizer.json", "tokenizer.bin"):
        if (opened.directory.path / name).exists():
            (opened.directory.path / name).copy(out / name)
    numbers = sum(tensor.size for tensor in tensors.values())
    print(f"{out}: {config['architectures'][0]}, {numbers} numbers in {len(tensors)} tensors")
    return 0


def _ungated(opened: OpenedRun, seed: int) -> Any:
    """The params of a seed with every gate multiplied into the product that follows it."""
    params, constants = opened.trees(seed)
    changes = {}
    for name in head_shapes(opened.run):
        stack, layer, place = name.split("/")
        gate_H = np.asarray(constants[stack]["blocks"][int(layer)][place]["gate"])
        changes[name] = lambda part, gate_H=gate_H: {**part, "out": _scaled(part["out"], gate_H)}
    return edit(params, changes)


def _scaled(out: dict[str, Any], gate_H: np.ndarray) -> dict[str, Any]:
    return {**out, "kernel": np.asarray(out["kernel"]) * gate_H[:, None, None]}
