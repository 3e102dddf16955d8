"""Seeds as a command line gives them, and cells with other seeds: a sweep is widened by runs, never trained anew."""

import dataclasses
from collections.abc import Iterable, Sequence

from mha_jax import config as configs
from mha_jax.specs import LARGEST_SEED, UserError
from mha_jax.sweeps.grid import Cell

_MOST = 1000


def parse(text: str) -> tuple[int, ...]:
    """ "3..9" (both ends), "3,5,8", or both: "0..2,7". Raises UserError, one line, for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dots, last = (piece.strip() for piece in part.partition(".."))
        if not first.isdecimal() or (dots and not last.isdecimal()):
            raise UserError(f"--seeds={text}: {part.strip()!r} is no seed; give numbers from 0 on, as 3..9 or 3,5,8")
        low, high = int(first), int(last or first)
        if high > LARGEST_SEED:
            raise UserError(f"--seeds={text}: {part.strip()!r} is too large; seeds are from 0 to {LARGEST_SEED}")
        if high < low:
            raise UserError(f"--seeds={text}: {part.strip()!r} runs backwards; give {high}..{low}")
        if high - low >= _MOST:
            raise UserError(f"--seeds={text}: {part.strip()!r} is {high - low + 1} seeds; at most {_MOST}")
        seeds += range(low, high + 1)
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds={text}: seed {next(s for s in seeds if seeds.count(s) > 1)} is there twice")
    return tuple(seeds)


def in_words(seeds: Iterable[int]) -> str:
    """Three or more in a row as "3..9": what `parse` reads."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)


def with_seeds(cells: Sequence[Cell], seeds: Sequence[int]) -> list[Cell]:
    """The same cells as runs of these seeds: everything else in their configs is equal.

    Raises: UserError where a cell sets its seeds itself, or cannot be run with so many.
    """
    made = []
    for cell in cells:
        if "seeds" in cell.overrides:
            raise UserError(f"--seeds is not for this sweep: its cells set their seeds themselves ({cell.run_id})")
        config = configs.override(cell.config, {"seeds": tuple(seeds)})
        if cell.reason is None:
            configs.resolve(config)
        run_id = configs.run_id(config, {**cell.overrides, **cell.tuned, "seeds": in_words(seeds)})
        made.append(dataclasses.replace(cell, run_id=run_id, config=config))
    return made
