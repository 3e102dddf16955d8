"""Times what the library does: `python -m experiments.bench WHAT`.

train_step   a step of a language model at several head counts, next to its matrix products alone and to PyTorch's step
             (PyTorch from requirements-bench.txt)
"""

import json
import shlex
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from mha_jax.benchmarks import tables, train_step
from mha_jax.benchmarks.environment import environment
from mha_jax.specs import UserError

_SIZES = {"num_layers": 4, "d_model": 256, "d_ff": 1024, "length": 256, "batch_size": 16}


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_list("heads", "1,4,16,32", "Head counts; heads times width is d_model.", flag_values=values)
    flags.DEFINE_integer("rounds", 15, "How often each contestant is timed.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("profile", False, "Time the parts of our step as well.", flag_values=values)
    flags.DEFINE_string("out", None, "JSON file for times, machine, versions and command.", flag_values=values)
    for name, size in _SIZES.items():
        flags.DEFINE_integer(name, size, "Size of the model and its batch.", flag_values=values)
    cli.parse(values, [argv[0], *(argument for argument in argv[1:] if argument != "train_step")], __doc__)
    if "train_step" not in argv:
        raise UserError("say what to time, for instance: python -m experiments.bench train_step")
    if not all(count.isdecimal() and int(count) for count in values.heads):
        raise UserError(f"--heads={','.join(values.heads)} must be positive integers with commas between")

    sizes: dict[str, Any] = {name: values[name].value for name in _SIZES}
    runs = [train_step.language_model(int(count), **sizes) for count in values.heads]
    result: dict[str, Any] = {
        "benchmark": "train_step",
        "command": shlex.join(["python", "-m", "experiments.bench", *argv[1:]]),
    }
    result |= {"environment": environment(), "sizes": sizes, "rounds": values.rounds}
    result |= train_step.measure(runs, values.rounds)
    print(tables.step_table(result["rows"]), *result["notes"], sep="\n")
    if values.profile:
        result["profile"] = {run.model.num_heads: train_step.profile(run, values.rounds) for run in runs}
        for num_heads, rows in result["profile"].items():
            print(f"\n{num_heads} heads\n\n{tables.profile_table(rows)}")
    if values.out:
        Path(values.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
