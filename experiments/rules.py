"""Draws rules of visibility: `python -m experiments.rules --out=docs/attention --length=64 --block=8`."""

from pathlib import Path

from absl import flags

from experiments import cli
from mha_jax.specs import UserError


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "Path of the picture, without ending.", flag_values=values)
    flags.DEFINE_integer("length", 64, "Queries and keys.", lower_bound=16, flag_values=values)
    flags.DEFINE_integer("block", 8, "Edge of a tile.", lower_bound=1, flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.out:
        raise UserError("--out is missing: where the picture goes, for instance docs/attention")
    if "://" not in values.out:
        cli.check_writable("out", Path(f"{values.out}.png"))
    from mha_jax.attention import BigBird, Causal, Fixed, Global, LogSparse, SlidingWindow, Strided
    from mha_jax.reporting.rules import draw_rules

    length = values.length
    root, eighth = round(length**0.5), length // 8
    rules = {
        "Causal()": Causal(),
        f"Causal() & SlidingWindow({eighth})": Causal() & SlidingWindow(eighth),
        f"SlidingWindow({eighth // 2}) | Global(3)": SlidingWindow(eighth // 2) | Global(3),
        f"SlidingWindow({eighth // 2}, dilation=3)": SlidingWindow(eighth // 2, dilation=3),
        f"Strided({root})": Strided(root),
        f"Fixed({root}, 2)": Fixed(root, 2),
        "Causal() & LogSparse()": Causal() & LogSparse(),
        f"BigBird({root}, {eighth // 2}, 1, 3, {length})": BigBird(root, eighth // 2, 1, 3, length),
    }
    draw_rules(rules, length, values.block, values.out)
    print(f"picture: {values.out}.png, {values.out}.svg")
    return 0


if __name__ == "__main__":
    cli.run(main)
