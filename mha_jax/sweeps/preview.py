"""What a sweep would cost, as a table, before anything is trained."""

from collections.abc import Callable, Sequence

from mha_jax.models import cost
from mha_jax.specs import ATTENTION_KINDS, RunSpec, UserError
from mha_jax.sweeps.grid import Cell

_HEADER = ("run", "heads", "kv", "d_k", "d_v", "parameters", "FLOPs/token", "KV bytes/token", "peak memory")


def table(cells: Sequence[Cell], peak_bytes: Callable[[RunSpec], int | None]) -> str:
    """One line a legal cell, then the illegal cells with their reasons.

    FLOPs are of the forward pass per target token; K/V-cache bytes per token of one sequence, over all layers.

    Args:    peak_bytes: predicts the peak memory of a run; None where it cannot.
    """
    legal = [cell for cell in cells if cell.reason is None]
    rows = [_HEADER, *(_row(cell, peak_bytes) for cell in legal)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "  ".join(_pad(text, width, i) for i, (text, width) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    illegal = [f"left out: {cell.run_id}: {cell.reason}" for cell in cells if cell.reason is not None]
    steps = sum(cell.run.training.steps * len(cell.run.seeds) for cell in legal)
    total = f"{len(legal)} cells, {steps:,} steps over all seeds; nothing was trained"
    return "\n".join([line.rstrip() for line in lines] + illegal + [total])


def _row(cell: Cell, peak_bytes: Callable[[RunSpec], int | None]) -> tuple[str, ...]:
    run = cell.run
    counts = (cost.parameters(run), cost.flops_per_token(run), cost.kv_cache_bytes_per_token(run))
    try:
        peak = peak_bytes(run)
    except UserError as error:
        return (cell.run_id, *_heads(run), *(f"{n:,}" for n in counts), f"none: {error}")
    return (
        cell.run_id,
        *_heads(run),
        *(f"{n:,}" for n in counts),
        "unknown" if peak is None else f"{peak / 2**20:,.0f} MiB",
    )


def _heads(run: RunSpec) -> tuple[str, ...]:
    """Heads, groups and widths; where layers differ, each value that occurs."""
    shapes = [shape for kind in ATTENTION_KINDS[run.task] for shape in run.model.heads(kind)]
    return tuple(
        "/".join(dict.fromkeys(str(getattr(shape, field)) for shape in shapes))
        for field in ("num_heads", "num_kv_heads", "qk_dim", "v_dim")
    )


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
