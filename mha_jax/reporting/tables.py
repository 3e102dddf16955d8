"""The paper's table with error bars, as numbers and as text; formats.py writes it out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mha_jax.config import flatten
from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.statistics import Estimate, holm, interval, paired

_HEADLINES = {
    "lm": ("validation/loss", "validation/bits_per_byte", "test/loss"),
    "translation": ("validation/loss", "validation/perplexity", "validation/bleu", "test/bleu"),
    "masked_lm": ("validation/loss", "validation/perplexity", "validation/accuracy", "test/loss"),
    "classification": ("validation/loss", "validation/accuracy", "test/accuracy"),
}
_DECIMALS = {"loss": 3, "perplexity": 3, "bits_per_byte": 3, "bleu": 2, "accuracy": 4, "heads_alive": 1}
_UNITS = {"loss": "nats/token"}
_COSTS = {"params": "parameters", "FLOPs/token": "flops_per_token"}
_SHAPE = ("model.num_heads", "model.num_kv_heads", "model.qk_dim", "model.v_dim")


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of the grid: its columns as text, and the numbers behind them."""

    cell: Cell
    label: str
    is_base: bool
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]  # this cell minus the base, paired by seed
    adjusted: Mapping[str, float | None]  # p of those differences, Holm over the rows
    paper: Mapping[str, Any]
    text: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns in order; a finished cell has a row, any other is in `missing` with its reason."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    missing: tuple[tuple[str, str], ...]


def headlines(results: Results) -> list[str]:
    """The metrics that the table shows; results.csv has them all."""
    wanted = _HEADLINES.get(str((results.sweep.get("base_config") or {}).get("task")), ())
    shown = [name for name in wanted if name in results.metrics] or results.metrics[:3]
    return shown + ["validation/heads_alive"] * ("validation/heads_alive" in results.metrics)


def deciding(results: Results) -> list[str]:
    """The metrics that differences are taken of: validation loss, and BLEU or accuracy where the task has them."""
    shown = headlines(results)
    return [m for m in shown if m in ("validation/loss", "validation/bleu", "validation/accuracy")] or shown[:1]


def make(results: Results) -> Table:
    """The table of all finished cells. Differences are paired by seed, p-values adjusted over the rows (Holm 1979)."""
    decide = deciding(results)
    base = results.base if results.base and results.base.state == "done" else None
    differences = [_differences(cell, base, decide) for cell in results.done]
    adjusted = {m: holm([d[m].p if m in d else None for d in differences]) for m in decide}
    rows = []
    for i, cell in enumerate(results.done):
        estimates = {m: interval(list(cell.values(m).values())) for m in headlines(results)}
        row = Row(
            cell=cell,
            label=results.label(cell.overrides),
            is_base=cell is base,
            estimates={m: e for m, e in estimates.items() if e},
            differences=differences[i],
            adjusted={m: adjusted[m][i] for m in decide},
            paper=results.paper_row(cell) or {},
            text={},
        )
        rows.append(dataclasses.replace(row, text=_text(row, results)))
    used = {name for row in rows for name in row.text}
    return Table(tuple(c for c in _columns(results) if c in used), tuple(rows), tuple(results.missing))


def _differences(cell: Cell, base: Cell | None, metrics: list[str]) -> dict[str, Estimate]:
    if base is None or cell is base:
        return {}
    found = {m: paired(cell.values(m), base.values(m)) for m in metrics}
    return {m: d for m, d in found.items() if d}


def heading(metric: str) -> str:
    """ "validation/loss" as a column's head."""
    return metric.replace("/", " ").replace("_", " ").replace("bleu", "BLEU")


def with_unit(metric: str) -> str:
    """ "validation/loss" as an axis says it: "validation loss (nats/token)"."""
    unit = _UNITS.get(_leaf(metric))
    return f"{heading(metric)} ({unit})" if unit else heading(metric)


def _columns(results: Results) -> list[str]:
    """Every column that a row may have, in order."""
    decide = deciding(results)
    order = ["cell", "h", "h_kv", "d_k", "d_v", *(n for n in results.swept if n not in _SHAPE)]
    order += [*map(_tuned, results.tuned), "tuned by", *_COSTS]
    for m in headlines(results):
        order.append(heading(m))
        order += [_delta(m), _p(m)] if m in decide else []
        order.append(_paper(m))
    return [*dict.fromkeys(order), "paper params", "n", "tokens/s", "memory plan / seen"]


def _leaf(metric: str) -> str:
    return metric.rsplit("/", 1)[-1]


def _delta(metric: str) -> str:
    return f"Δ {heading(_leaf(metric))}"


def _p(metric: str) -> str:
    return f"p {heading(_leaf(metric))}"


def _tuned(field: str) -> str:
    return f"tuned {_leaf(field.replace('.', '/')).replace('_', ' ')}"


def _paper(metric: str) -> str:
    return f"paper {heading(_leaf(metric))}"


def _text(row: Row, results: Results) -> dict[str, str]:
    cell, status = row.cell, row.cell.status
    text = {"cell": row.label, **_shape_text(cell, results)}
    for name in results.swept:
        if name not in _SHAPE:
            text[name] = str(flatten(cell.config or {}).get(name))
    text |= {_tuned(name): short(value) for name, value in cell.tuned.items()}
    if cell.tuned and results.tuning:
        seeds = len(results.tuning["seeds"])
        text["tuned by"] = f"{len(cell.trials)} trials × {seeds} seed{'s' * (seeds > 1)}"
    text |= {name: count(status[key]) for name, key in _COSTS.items() if key in status}
    for m, e in row.estimates.items():
        text[heading(m)] = plus_minus(m, e)
    for m, d in row.differences.items():
        text[_delta(m)] = signed(m, d)
        p = row.adjusted[m]
        text[_p(m)] = "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
    for m in headlines(results):
        if row.paper.get(m) is not None:
            text[_paper(m)] = f"{row.paper[m]:g}"
    if row.paper.get("parameters") is not None:
        text["paper params"] = count(row.paper["parameters"])
    text["n"] = str(max((e.n for e in row.estimates.values()), default=0))
    speeds = list(cell.training("tokens_per_second").values())
    if speeds:
        text["tokens/s"] = count(sum(speeds) / len(speeds))
    planned, seen = status.get("predicted_peak_bytes"), max(cell.training("peak_bytes").values(), default=None)
    if planned or seen:
        text["memory plan / seen"] = f"{memory(planned)} / {memory(seen)}"
    return text


def head_shape(cell: Cell) -> dict[str, Any]:
    """h, h_kv, d_k, d_v of a cell as its config means them: what is left out is filled in where it is one number."""
    model = (cell.config or {}).get("model", {})
    heads, width = model.get("num_heads"), model.get("d_model")
    derived = width // heads if isinstance(heads, int) and heads and isinstance(width, int) else None
    kv = model.get("num_kv_heads")
    return {
        "h": heads,
        "h_kv": heads if kv is None else kv,
        "d_k": model.get("qk_dim") or derived,
        "d_v": model.get("v_dim") or derived,
    }


def _shape_text(cell: Cell, results: Results) -> dict[str, str]:
    shape = head_shape(cell)
    if "model.num_kv_heads" not in results.swept and shape["h_kv"] == shape["h"]:
        del shape["h_kv"]
    return {name: "–" if value is None else str(value) for name, value in shape.items()}


def count(value: int | float) -> str:
    """Three significant digits and k, M, G, T."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def short(value: Any) -> str:
    """A setting as a reader types it: "0.002", "cosine"."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def memory(value: int | float | None) -> str:
    """Bytes in MiB or GiB; a dash where nothing was measured."""
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def decimals(metric: str) -> int:
    return _DECIMALS.get(_leaf(metric), 3)


def plus_minus(metric: str, e: Estimate) -> str:
    """ "1.834 ± 0.012"; without the interval where one seed gives none."""
    d = decimals(metric)
    return f"{e.mean:.{d}f}" if e.half_width is None else f"{e.mean:.{d}f} ± {e.half_width:.{d}f}"


def signed(metric: str, e: Estimate) -> str:
    """ "−0.031 [−0.050, −0.012]"."""
    d = decimals(metric)
    spread = "" if e.low is None or e.high is None else f" [{e.low:+.{d}f}, {e.high:+.{d}f}]"
    return f"{e.mean:+.{d}f}{spread}".replace("-", "−")
