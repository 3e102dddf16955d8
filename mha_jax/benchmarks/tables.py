"""Times as markdown, for the terminal and for docs/benchmarks."""

from collections.abc import Sequence
from typing import Any

from mha_jax.benchmarks.train_step import FLOOR, OURS


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left and all others to the right, padded so that it reads as plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _spread(summary: dict[str, float], digits: int) -> str:
    return f"{summary['median']:.{digits}f} ({summary['min']:.{digits}f}-{summary['max']:.{digits}f})"


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row a head count: median (least-greatest) milliseconds, tokens a second, and ours over each other, paired."""
    names = list(dict.fromkeys(name for row in rows for name in row["step_ms"]))
    others = [name for name in names if name not in (OURS, FLOOR)]
    header = ["heads x width", f"{OURS} ms", "tokens/s", f"{FLOOR} ms", "floor's share"]
    header += [cell for name in others for cell in (f"{name} ms", f"{OURS} / {name}")]

    def cells(row: dict[str, Any]) -> list[str]:
        ms, ratio = row["step_ms"], row["ratio"]
        start = [
            f"{row['num_heads']} x {row['qk_dim']}",
            _spread(ms[OURS], 1),
            f"{row['tokens_per_second'][OURS]:,.0f}",
        ]
        start += [_spread(ms[FLOOR], 1), f"{100 / ratio[FLOOR]['median']:.0f} %"]
        timed = [(_spread(ms[n], 1), _spread(ratio[n], 2)) if n in ms else ("-", "-") for n in others]
        return start + [cell for pair in timed for cell in pair]

    return markdown(header, [cells(row) for row in rows])


def profile_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row a part: milliseconds in a step, its share of the step, its matrix products alone, and what is over."""
    step = rows[-1]["ms"]

    def cells(row: dict[str, Any]) -> list[str]:
        over = row["ms"] - row["matmul_ms"]
        return [
            row["part"],
            f"{row['ms']:.1f}",
            f"{100 * row['ms'] / step:.0f} %",
            f"{row['matmul_ms']:.1f}",
            f"{over:.1f}",
        ]

    return markdown(["part", "ms a step", "share", "its products alone, ms", "over, ms"], [cells(row) for row in rows])
