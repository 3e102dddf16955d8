"""A table as Markdown, CSV, LaTeX and lines. Files carry its caption, so that none travels without its provenance."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mha_jax.reporting.claims import Verdict
from mha_jax.reporting.tables import Table, head_shape

_LATEX = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "–": "--",
    "−": "$-$",
    "<": "$<$",
}


def markdown(table: Table, verdicts: list[Verdict], caption: list[tuple[str, str]]) -> str:
    """A Markdown table that is aligned for terminals too, then what is missing and why, the claims, the caption."""
    lines = [[row.text.get(c, "–").replace("|", "\\|") for c in table.columns] for row in table.rows]
    for row, line in zip(table.rows, lines, strict=True):
        line[0] = f"**{line[0]}**" if row.is_base else line[0]
    widths = [max(map(len, column)) for column in zip(table.columns, *lines, strict=True)]
    body = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in (table.columns, *lines)]
    body.insert(1, ["-" * width for width in widths])
    parts = ["\n".join("| " + " | ".join(line) + " |" for line in body) if lines else "No cell has finished yet."]
    if table.missing:
        parts.append("\n".join(f"- missing: {label}: {reason}" for label, reason in table.missing))
    if verdicts:
        parts.append("\n".join(f"- claim **{v.status}**: {v.text} {v.sentence}" for v in verdicts))
    parts.append("\n".join(f"- {name}: {value}" for name, value in caption))
    return "\n\n".join(parts) + "\n"


def csv_text(table: Table, more: Sequence[Mapping[str, Any]] = ()) -> str:
    """One line a cell; numbers bare, with mean, low, high, n and p in columns of their own.

    Args: more: further columns of each row.
    """
    rows = []
    for row, further in zip(table.rows, more or [{}] * len(table.rows), strict=True):
        line: dict[str, Any] = {"run": row.cell.run, "cell": row.label, "base": row.is_base, **head_shape(row.cell)}
        line |= row.cell.tuned
        line |= {key: row.cell.status.get(key) for key in ("parameters", "flops_per_token", "kv_cache_bytes_per_token")}
        for m, e in row.estimates.items():
            line |= {m: e.mean, f"{m} low": e.low, f"{m} high": e.high, f"{m} n": e.n}
        for m, d in row.differences.items():
            line |= {f"{m} difference": d.mean, f"{m} difference low": d.low, f"{m} difference high": d.high}
            line |= {f"{m} p": d.p, f"{m} p holm": row.adjusted[m]}
        line |= further
        line |= {f"paper {k}": v for k, v in row.paper.items() if k not in ("label", "cell")}
        rows.append(line)
    return rows_as_csv(rows)


def rows_as_csv(rows: list[dict[str, Any]]) -> str:
    """Dicts as CSV under the union of their keys; what a row lacks is an empty field."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return out.getvalue()


def latex(table: Table, caption: list[tuple[str, str]]) -> str:
    """A booktabs table; the caption is the provenance."""

    def escape(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text)

    body = [" & ".join(escape(row.text.get(c, "–")) for c in table.columns) + r" \\" for row in table.rows]
    notes = escape("; ".join(f"{name}: {value}" for name, value in caption))
    return "\n".join(
        [
            r"\begin{table}",
            r"\begin{tabular}{l" + "r" * (len(table.columns) - 1) + "}",
            r"\toprule",
            " & ".join(map(escape, table.columns)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{notes}}}",
            r"\end{table}",
            "",
        ]
    )


def aligned(tables: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines for a terminal of tables {"caption", "columns", "rows"} of strings, their columns aligned."""
    for table in tables:
        body = [table["columns"], *table["rows"]]
        widths = [max(map(len, column)) for column in zip(*body, strict=True)]
        yield table["caption"]
        yield from ("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in body)
        yield ""
