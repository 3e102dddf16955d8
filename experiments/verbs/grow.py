"""Other heads for a trained run: `python -m experiments.heads grow --run=DIR --to_groups=2 --kinds=decoder,cross`.

--split=NAME:0,2   each of these heads as two (exact); --split=all: every head
--add=NAME:2       so many heads more, which change nothing at first (exact); --add=2: in every attention
--merge=NAME:0+1   two heads as one: exact if they do the same, else as close as one head comes
--to_groups=G      grouped-query attention: keys and values of neighbouring heads pooled (Ainslie et al. 2023); further
                   steps after that are their uptraining: --steps of 5 % of the parent's

For each seed a new run directory is made that names its parent and has its optimiser state, as `prune` makes them.
NEW/heads/grow.json: as NEW/heads/prune.json, with "surgery": "grow" and {"how", "exact", and what was asked for}.
"""

from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import cli, surgery
from mha_jax.heads.capture import kind_of
from mha_jax.heads.growing import Made, add_heads, split_heads, to_groups
from mha_jax.heads.merging import merge_heads
from mha_jax.heads.surgery import Shapes, head_shapes
from mha_jax.specs import ATTENTION_KINDS, UserError
from mha_jax.sweeps.children import child_state
from mha_jax.sweeps.opening import OpenedRun, chosen_seeds

_WAYS = ("split", "add", "merge", "to_groups")
Surgery = Callable[[dict[str, Any], Any], Made]


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    surgery.define_run(values)
    flags.DEFINE_string("split", None, "Heads to split: NAME:0,2;NAME:1, or all.", flag_values=values)
    flags.DEFINE_string("add", None, "How many heads more: NAME:2;NAME:1, or 2.", flag_values=values)
    flags.DEFINE_string("merge", None, "Pairs of heads to merge: NAME:0+1,2+3.", flag_values=values)
    flags.DEFINE_integer("to_groups", None, "How many key/value heads each attention keeps.", flag_values=values)
    flags.DEFINE_list("kinds", None, "Of --to_groups: encoder, decoder, cross; default: all.", flag_values=values)
    flags.DEFINE_enum("pool", "mean", ["mean", "first"], "Of --to_groups: what a group keeps.", flag_values=values)
    surgery.define_child(values)
    cli.parse(values, argv, __doc__)
    given = [way for way in _WAYS if values[way].value is not None]
    if len(given) != 1:
        raise UserError(f"say what to do by exactly one of {', '.join('--' + way for way in _WAYS)}")
    opened = surgery.opened_run(values)
    code = 0
    for seed in chosen_seeds(opened, values.seed):
        operation, record = _operation(opened, seed, given[0], values)
        made = operation(opened.config, child_state(opened, seed))
        what = {"surgery": "grow", "how": given[0], **record}
        code = code or surgery.make_child(opened, seed, made, what, {given[0]: values[given[0]].value}, values)
    return code


def _operation(opened: OpenedRun, seed: int, way: str, values: flags.FlagValues) -> tuple[Surgery, dict[str, Any]]:
    """What is done to config and state, and how it is recorded."""
    shapes = head_shapes(opened.run)
    if way == "split":
        heads = _all_heads(shapes) if values.split == "all" else surgery.named_heads("split", values.split)
        return lambda config, state: split_heads(config, state, heads), {"heads": heads, "exact": True}
    if way == "add":
        counts = _counts(shapes, values.add)
        return lambda config, state: add_heads(config, state, counts, seed), {"counts": counts, "exact": True}
    if way == "merge":
        pairs = _pairs(values.merge)
        return lambda config, state: merge_heads(config, state, pairs), {"pairs": pairs, "exact": False}
    names = _of_kinds(opened, shapes, values.kinds)
    record = {"to_groups": values.to_groups, "pool": values.pool, "attentions": names, "exact": False}
    return lambda config, state: to_groups(config, state, values.to_groups, names, values.pool), record


def _all_heads(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name: tuple(range(shape.num_heads)) for name, shape in shapes.items()}


def _counts(shapes: Shapes, text: str) -> dict[str, int]:
    if text.isdecimal():
        return dict.fromkeys(shapes, int(text))
    named = surgery.named_heads("add", text)
    for name, numbers in named.items():
        if len(numbers) != 1:
            raise UserError(f"--add={text!r} gives {name} {len(numbers)} numbers; it needs one, how many heads to add")
    return {name: numbers[0] for name, numbers in named.items()}


def _pairs(text: str) -> dict[str, list[tuple[int, int]]]:
    """ "NAME:0+1,2+3" -> {"NAME": [(0, 1), (2, 3)]}."""
    found: dict[str, list[tuple[int, int]]] = {}
    for entry in text.split(";"):
        name, _, pairs = entry.strip().rpartition(":")
        split = [pair.split("+") for pair in pairs.split(",")]
        if not name or name in found or any(len(p) != 2 or not all(h.strip().isdecimal() for h in p) for p in split):
            raise UserError(f"--merge={text!r} is not understood at {entry!r}; it reads NAME:0+1,2+3;NAME:0+2")
        found[name] = [(int(a), int(b)) for a, b in split]
    return found


def _of_kinds(opened: OpenedRun, shapes: Shapes, kinds: list[str] | None) -> list[str]:
    present = ATTENTION_KINDS[opened.run.task]
    for kind in kinds or ():
        if kind not in present:
            raise UserError(f"--kinds has {kind!r}; this model has {', '.join(present)}")
    return [name for name in shapes if kind_of(name) in (kinds or present)]
