"""What `prune`, `curve` and `grow` share: heads named on the command line, what they are ordered by, the child run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from experiments import cli
from experiments.verbs.importance import even_batches
from mha_jax import config as configs
from mha_jax.heads.importance import MEASURES, importance
from mha_jax.heads.pruning import Scores, random_scores, reversed_scores
from mha_jax.heads.surgery import head_shapes
from mha_jax.models import cost
from mha_jax.specs import MeshSpec, RunSpec, UserError
from mha_jax.sweeps.cell import Exit, run_cell
from mha_jax.sweeps.children import child_config, child_state, write_child
from mha_jax.sweeps.opening import OpenedRun, open_run
from mha_jax.sweeps.store import RunDirectory, read_json, write_json
from mha_jax.training.evaluation import evaluate
from mha_jax.training.metrics import read_metrics
from mha_jax.training.parallel import make_program


def define_run(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "The directory of a finished run.", flag_values=values)
    flags.DEFINE_integer("seed", None, "One of its seeds; default: all of them.", flag_values=values)


def define_order(values: flags.FlagValues) -> None:
    flags.DEFINE_string("order", "gradient_normalised", "A measure, reversed-MEASURE, random.", flag_values=values)
    flags.DEFINE_integer("order_seed", 0, "Of --order=random.", flag_values=values)
    flags.DEFINE_bool("per_layer", False, "The same share of heads in every attention.", flag_values=values)
    flags.DEFINE_bool("by_groups", False, "Key/value groups go whole, with all their heads.", flag_values=values)
    flags.DEFINE_string("split", "validation", "Where the measure is taken.", flag_values=values)
    flags.DEFINE_integer("batches", 8, "Over how many batches.", lower_bound=1, flag_values=values)


def define_child(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("steps", 0, "How many more steps the new run trains.", flag_values=values)
    flags.DEFINE_string("out", None, "The new run goes to OUT/runs; default: beside its parent.", flag_values=values)
    flags.DEFINE_bool("progress", True, "Show a progress bar.", flag_values=values)


def opened_run(values: flags.FlagValues) -> OpenedRun:
    if not values.run:
        raise UserError("--run is missing: the directory of a finished run, DIR/runs/NAME")
    return open_run(values.run)


def named_heads(flag: str, text: str) -> dict[str, tuple[int, ...]]:
    """ "encoder/0/attention:1,3;decoder/1/cross_attention:0" -> {"encoder/0/attention": (1, 3), ...}."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in text.split(";"):
        name, colon, numbers = entry.strip().rpartition(":")
        parts = numbers.split(",")
        if not colon or name in found or not all(part.strip().isdecimal() for part in parts):
            raise UserError(
                f"--{flag}={text!r} is not understood at {entry!r}; it reads NAME:1,3;NAME:0, each NAME once, "
                "for instance decoder/0/attention:1,3"
            )
        found[name] = tuple(int(part) for part in parts)
    return found


def scores(opened: OpenedRun, seed: int, order: str, *, split: str, batches: int, order_seed: int = 0) -> Scores:
    """The worth of every head of one seed's model by a measure, "random", or "reversed-MEASURE".

    What `heads importance` has written for this run and split is read; else the measure is taken over a few batches.
    """
    if order == "random":
        return random_scores(head_shapes(opened.run), order_seed)
    measure = order.removeprefix("reversed-")
    found = _written(opened, seed, measure, split)
    if found is None:
        if measure not in MEASURES:
            raise UserError(
                f"--order={order!r} is not 'random', a measure ({', '.join(MEASURES)}), or 'reversed-' with a measure; "
                "for another measure run `heads importance` first"
            )
        model = opened.model(seed)
        tables = importance(opened.run.task, model, even_batches(opened, split, batches), (measure,))
        found = tables[measure].mean
    return reversed_scores(found) if measure != order else found


def _written(opened: OpenedRun, seed: int, measure: str, split: str) -> Scores | None:
    """The measure as `heads importance` has written it, where it read this split and every head."""
    file = opened.directory.path / "heads" / "importance.json"
    record = read_json(file) if file.exists() else {}
    found = record.get("seeds", {}).get(str(seed), {}).get(measure)
    if (
        found is None
        or record["data"].split(",")[0] != split
        or found["heads"].keys() != head_shapes(opened.run).keys()
    ):
        return None
    return {name: np.asarray(one["mean"], np.float64) for name, one in found["heads"].items()}


def one_seed(run: RunSpec, seed: int) -> RunSpec:
    """The run of one of its seeds, on one device."""
    return dataclasses.replace(run, seeds=(seed,), mesh=MeshSpec(), parallel="jit")


def validation(opened: OpenedRun, run: RunSpec, state: Mapping[str, Any]) -> dict[str, float]:
    """Loss and accuracy of a model of one seed on the whole validation split, without writing anything."""
    program = make_program(run, jax.devices()[:1])
    found = evaluate(program, state["params"], state["constants"], opened.data, "validation")
    return {name: float(np.ravel(found[name])[0]) for name in ("loss", "accuracy")}


def make_child(
    opened: OpenedRun,
    seed: int,
    made: tuple[dict[str, Any], Any],
    surgery: Mapping[str, Any],
    label: Mapping[str, Any],
    values: flags.FlagValues,
) -> int:
    """Writes the child run, trains it its further steps, evaluates it, and tells what became of the loss."""
    verb = str(surgery["surgery"])
    config = child_config(opened, seed, made[0], surgery, values.steps)
    run = configs.resolve(config)
    directory = write_child(opened, config, made[1], label, values.out)
    found = {
        "run": directory.run_id,
        "parent": config["parent"],
        "heads": {"before": _counts(opened.run), "after": _counts(run)},
        "parameters": {"before": cost.parameters(opened.run), "after": cost.parameters(run)},
        "validation": {
            "before": validation(opened, one_seed(opened.run, seed), child_state(opened, seed)),
            "after": validation(opened, one_seed(run, seed), made[1]),
        },
    }
    code = run_cell(directory, progress=values.progress)
    if code in (Exit.FAILED, Exit.WRONG_INPUT):
        cli.complain(directory.failure)
        return code
    if code == Exit.STOPPED:
        print(f"stopped, state saved; python -m experiments.train --run={directory.path} goes on")
        return code
    found["final"] = _final(directory)
    write_json(directory.path / "heads" / f"{verb}.json", found)
    print(_told(found, directory.path))
    return Exit.DONE


def _counts(run: RunSpec) -> dict[str, int]:
    return {name: shape.num_heads for name, shape in head_shapes(run).items()}


def _final(directory: RunDirectory) -> dict[str, float]:
    """The child's own numbers at its last step: {"validation/loss": ...}."""
    rows, _ = read_metrics(directory.path / "metrics.jsonl")
    step = configs.resolve(directory.config).training.steps
    return {f"{r['split']}/{r['name']}": r["value"] for r in rows if r["step"] == step and r["split"] != "train"}


def _told(found: Mapping[str, Any], path: epath.Path) -> str:
    heads, loss = found["heads"], {when: values["loss"] for when, values in found["validation"].items()}
    parameters = found["parameters"]
    lines = [f"{name:28} {heads['before'][name]:3} -> {count}" for name, count in heads["after"].items()]
    lines += [
        f"parameters {parameters['before']:,} -> {parameters['after']:,}",
        f"validation loss {loss['before']:.4f} -> {loss['after']:.4f}, at the last step "
        f"{found['final']['validation/loss']:.4f} nats a target",
        str(path),
    ]
    return "\n".join(lines)
