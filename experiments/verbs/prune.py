"""Removes heads of a trained run: `python -m experiments.heads prune --run=DIR --fraction=0.5 --order=gradient`.

Which heads go: --fraction or --count of them, lowest --order first; those named by --heads; or those whose gate is 0
(--closed). For each seed a new run directory is made whose config has the heads that are left and names the parent, and
whose checkpoint has the parent's parameters and optimiser state. `experiments.train --run=NEW` and every other command
take it as any run. With --steps it trains on; without, it is only evaluated.

NEW/heads/prune.json: {"run", "parent": {"run", "seed", "step", "surgery", "order", "kept": {attention: heads}},
"heads" and "parameters" {"before", "after"}, "validation" {"before", "after"}: {"loss", "accuracy"} at the moment of
removal, "final": the child's metrics at its last step}.
"""

from typing import Any

import numpy as np
from absl import flags

from experiments import cli, surgery
from mha_jax.heads.gating import alive
from mha_jax.heads.pruning import Keep, count_of_fraction, removal_order, what_is_left
from mha_jax.heads.surgery import Shapes, check_heads, head_shapes, keep_heads
from mha_jax.specs import UserError
from mha_jax.sweeps.children import child_state
from mha_jax.sweeps.opening import OpenedRun, chosen_seeds


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    surgery.define_run(values)
    flags.DEFINE_float("fraction", None, "Which share of the heads goes, 0 to 1.", flag_values=values)
    flags.DEFINE_integer("count", None, "How many heads (with --by_groups: groups) go.", flag_values=values)
    flags.DEFINE_string("heads", None, "Heads that go: NAME:1,3;NAME:0.", flag_values=values)
    flags.DEFINE_string("groups", None, "Key/value groups that go: NAME:1;NAME:0.", flag_values=values)
    flags.DEFINE_bool("closed", False, "The heads whose gate is exactly 0 go.", flag_values=values)
    surgery.define_order(values)
    surgery.define_child(values)
    cli.parse(values, argv, __doc__)
    _check_ways(values)
    opened = surgery.opened_run(values)
    code = 0
    for seed in chosen_seeds(opened, values.seed):
        code = code or _prune(opened, seed, values)
    return code


def _check_ways(values: flags.FlagValues) -> None:
    named = values.heads or values.groups
    given = [values.fraction is not None, values.count is not None, bool(named), values.closed]
    if sum(given) != 1:
        raise UserError("say which heads go by exactly one of --fraction, --count, --heads (or --groups), --closed")


def _prune(opened: OpenedRun, seed: int, values: flags.FlagValues) -> int:
    shapes = head_shapes(opened.run)
    groups = None
    if values.heads or values.groups:
        keep, groups, order = *_named(shapes, values), "named"
    elif values.closed:
        keep, order = _open(opened, seed), "closed"
    else:
        keep, order = _ordered(opened, seed, values), values.order
    section, state = keep_heads(opened.config, child_state(opened, seed), keep, groups)
    before = sum(shape.num_heads for shape in shapes.values())
    left = sum(len(keep.get(name, range(shape.num_heads))) for name, shape in shapes.items())
    record: dict[str, Any] = {"surgery": "prune", "order": order, "kept": keep}
    return surgery.make_child(opened, seed, (section, state), record, {"pruned_to": f"{left}of{before}"}, values)


def _named(shapes: Shapes, values: flags.FlagValues) -> tuple[Keep, Keep]:
    """The heads and groups that stay, for the attentions that --heads and --groups name."""
    gone = surgery.named_heads("heads", values.heads) if values.heads else {}
    gone_groups = surgery.named_heads("groups", values.groups) if values.groups else {}
    for name, heads in gone.items():
        check_heads(shapes, name, heads)
    for name, numbers in gone_groups.items():
        check_heads(shapes, name, numbers, "group")
        if values.by_groups:
            gone[name] = tuple({*gone.get(name, ()), *(h for h, g in enumerate(shapes[name].groups) if g in numbers)})
    keep = {name: tuple(h for h in range(shapes[name].num_heads) if h not in heads) for name, heads in gone.items()}
    groups = {
        name: tuple(g for g in range(shapes[name].num_kv_heads) if g not in numbers)
        for name, numbers in gone_groups.items()
    }
    return keep, groups


def _open(opened: OpenedRun, seed: int) -> Keep:
    """The heads whose gate is not exactly 0."""
    return {name: tuple(map(int, np.flatnonzero(open_H))) for name, open_H in alive(opened.model(seed)).items()}


def _ordered(opened: OpenedRun, seed: int, values: flags.FlagValues) -> Keep:
    shapes = head_shapes(opened.run)
    total = sum(shape.num_heads for shape in shapes.values())
    # Before a measure is taken, which takes its time.
    if values.fraction is not None:
        count_of_fraction((), values.fraction)
    elif not 0 <= values.count <= total:
        raise UserError(f"--count={values.count} heads cannot be removed: the model has {total}")
    found = surgery.scores(
        opened, seed, values.order, split=values.split, batches=values.batches, order_seed=values.order_seed
    )
    order = removal_order(shapes, found, per_layer=values.per_layer, by_groups=values.by_groups)
    count = values.count if values.fraction is None else count_of_fraction(order, values.fraction)
    return what_is_left(shapes, order, count)
