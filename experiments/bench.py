"""Times what the library does: `python -m experiments.bench WHAT [--flags]`.

attention    self-attention with projections: our backends, jax.nn, flax.nnx and PyTorch, by head count
sparse       attention under each pattern over growing lengths: exponent, gain over dense, time for what is visible
decode       one cached token by head count and key/value heads, next to one read of the cache
memory       forward and backward over one long input: what this process holds
layers       a step with layers unrolled or scanned, kept or computed again: compile time, step time, memory
ablation     the loss without each head in turn: over a kept prefix, one gate at a time, and a process a head
pruned       a model without half its heads, one built with that shape, and the whole one, by batch size
routing      a layer whose router picks heads: all computed and gated, gathered, and a layer of so few heads
gates        a step of a language model with each way of gating its heads, beside one without
sweep        six small cells of one shape trained in packs, and each in a process of its own
probes       linear probes of all heads as one batched problem, beside one of scikit-learn
train_step   a step of a language model, next to its matrix products alone and to PyTorch's step
faults       a sweep killed at random moments: what differs from the same sweep left alone (nothing is timed)

`bench WHAT --help` names its flags. PyTorch and scikit-learn are in requirements-bench.txt; only probes needs either.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from absl import flags

from experiments import cli
from mha_jax.benchmarks import (
    ablation,
    attention,
    decode,
    faults,
    gates,
    layers,
    memory,
    plots,
    probes,
    pruned,
    routing,
    sparse,
    sweep,
    tables,
    train_step,
)
from mha_jax.benchmarks.environment import environment
from mha_jax.specs import UserError


class Verb(NamedTuple):
    """What is timed: its setting, whose fields are the flags, and how the result is taken, told and drawn."""

    setting: Any
    measure: Callable[[Any], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    figure: Callable[[dict[str, Any]], Any] | None


@dataclasses.dataclass(frozen=True)
class LayersSetting:
    """What is timed: a training step of a language model at each depth, in every way to run its layers."""

    rounds: int = 5
    depths: tuple[int, ...] = (4, 12, 24)
    num_heads: int = 4
    d_model: int = 64
    d_ff: int = 256
    length: int = 64
    batch_size: int = 8


def _measure_layers(setting: LayersSetting) -> dict[str, Any]:
    return {"rows": layers.measure_layers(**dataclasses.asdict(setting))}


VERBS = {
    "attention": Verb(attention.Setting, attention.measure, tables.attention_tables, plots.attention_figure),
    "sparse": Verb(sparse.Setting, sparse.measure, tables.sparse_tables, plots.sparse_figure),
    "decode": Verb(decode.Setting, decode.measure, tables.decode_table, plots.decode_figure),
    "memory": Verb(memory.Setting, memory.measure, tables.memory_table, None),
    "layers": Verb(LayersSetting, _measure_layers, tables.layers_table, None),
    "ablation": Verb(ablation.Setting, ablation.measure, tables.ablation_table, None),
    "pruned": Verb(pruned.Setting, pruned.measure, tables.pruned_table, None),
    "routing": Verb(routing.Setting, routing.measure, tables.routing_table, None),
    "gates": Verb(gates.Setting, gates.measure, tables.gates_table, None),
    "train_step": Verb(train_step.Setting, train_step.measure, tables.train_step, plots.train_step_figure),
    "probes": Verb(probes.Setting, probes.measure, probes.table, None),
    "sweep": Verb(sweep.Setting, sweep.measure, sweep.table, None),
    "faults": Verb(faults.Setting, faults.measure, faults.table, None),
}


def _define(setting: Any, values: flags.FlagValues) -> None:
    """One flag a field; tuples are lists with commas."""
    for field in dataclasses.fields(setting):
        about, default = field.name.replace("_", " "), cast(Any, field.default)
        if isinstance(default, tuple):
            listed = ",".join(map(str, default))
            flags.DEFINE_list(field.name, listed, f"{about}, with commas between", flag_values=values)
        elif isinstance(default, bool):
            flags.DEFINE_bool(field.name, default, about, flag_values=values)
        elif field.type in (int, int | None):
            flags.DEFINE_integer(field.name, default, about, lower_bound=1, flag_values=values)
        else:
            flags.DEFINE_string(field.name, default, about, flag_values=values)


def _given(field: dataclasses.Field[Any], value: Any) -> Any:
    if not isinstance(field.default, tuple):
        return value
    if not isinstance(field.default[0], int):
        if not value or not all(value):
            raise UserError(f"--{field.name}={','.join(value)} names nothing; {','.join(field.default)} is the default")
        return tuple(value)
    if not value or not all(part.isdecimal() and int(part) for part in value):
        raise UserError(f"--{field.name}={','.join(value)} must be positive integers with commas between")
    return tuple(map(int, value))


def main(argv: list[str]) -> int:
    named = [argument for argument in argv[1:] if argument in VERBS]
    if len(named) != 1:
        if "--help" in argv or "-h" in argv:
            print(__doc__)
            return 0
        raise UserError(
            f"say what to time, one of {', '.join(VERBS)}, for instance: python -m experiments.bench attention"
        )
    verb = VERBS[named[0]]
    values = flags.FlagValues()
    _define(verb.setting, values)
    flags.DEFINE_string("out", None, "JSON file for times, machine, versions and command.", flag_values=values)
    flags.DEFINE_string("plot", None, "Figure as .png and .svg; default: next to --out.", flag_values=values)
    cli.parse(values, [argument for argument in argv if argument != named[0]], verb.setting.__doc__)
    setting = verb.setting(**{f.name: _given(f, values[f.name].value) for f in dataclasses.fields(verb.setting)})

    for flag, given in (("out", values.out), ("plot", values.plot)):
        if given:
            cli.check_writable(flag, Path(given))

    measured = verb.measure(setting)
    command = shlex.join(["python", "-m", "experiments.bench", *argv[1:]])
    result = {"benchmark": named[0], "command": command, "environment": environment()}
    result |= {"setting": dataclasses.asdict(setting), **measured}
    print(verb.table(result))
    if values.out:
        Path(values.out).write_text(json.dumps(result, indent=1) + "\n")
    if verb.figure and (values.plot or values.out):
        plots.write(verb.figure, result, Path(values.plot or values.out))
    return 0


if __name__ == "__main__":
    cli.run(main)
