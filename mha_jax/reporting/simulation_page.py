"""The simulation of the claims checker as a page: tables in Markdown and one figure."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes

from mha_jax.reporting import power
from mha_jax.reporting.canvas import MUTED, OURS, PAPER, RAMP, STYLE, panels
from mha_jax.reporting.simulation import CLAIMS, EFFECT, MARGIN, SEEDS, Row, rows_of

_BAR = 0.05


class _Section(NamedTuple):
    """A part of the simulation: its title, what a reader must know, and its columns with their heads."""

    part: str
    title: str
    text: str
    columns: dict[str, str]


_RATES = {"held": "held", "not held": "not held", "undecided": "undecided"}
_SECTIONS = (
    _Section(
        "no effect",
        "One claim that is not true",
        f"""\
"Better", where the cells are equal; and "alike within {MARGIN:g} nats", where they are just that far apart.""",
        {"case": "claim", "spread": "spread", "seeds": "seeds", **_RATES},
    ),
    _Section(
        "claims",
        "Several claims, none of them true",
        """\
Each compares another cell with the same base. Decided one by one, the more claims the more often one is held by luck;
the checker adjusts their p-values for their number (Holm 1979). "Not held" is not adjusted: here it is the truth.""",
        {
            "claims": "claims",
            "seeds": "seeds",
            "held one by one": "any held, one by one",
            "held": "any held",
            "not held": "any not held",
            "undecided": "all undecided",
        },
    ),
    _Section(
        "added seeds",
        "Seeds added after a look",
        """\
The user adds seeds until a claim is held. Judged as if their number had been fixed beforehand, each look is another
chance; the checker halves the allowed error with each batch.""",
        {"claims": "claims", "seeds": "seeds", "held as if planned": "any held, as if planned", "held": "any held"},
    ),
    _Section(
        "noise",
        "Other noise",
        """\
One claim, cells equal. Nothing here repairs seeds that are not independent, nor noise that leans far to one side in
one of the two cells only.""",
        {
            "case": "noise",
            "seeds": "seeds",
            "held": "held",
            "held, cells swapped": "held, cells swapped",
            "undecided": "undecided",
        },
    ),
    _Section(
        "effect",
        f"Power: one claim is true, by {EFFECT:.4f} nats",
        """\
That is ln(5.29 / 4.92), one head against eight in Table 3 (A) of Vaswani et al. 2017. "Held of m": how often the true
claim is held where the sweep has m claims and the others are not true. "Computed" is the power of the t-test for one
claim. "Not held": at most, over the three.""",
        {
            "spread": "spread",
            "seeds": "seeds",
            "computed": "computed",
            **{f"held of {m}": f"held of {m}" for m in (1, 3, 10)},
            "not held": "not held",
        },
    ),
    _Section(
        "equal cells",
        f"Power: the cells are equal, and the claim is that they are alike within {MARGIN:g} nats",
        """\
"Computed" is a lower bound, near from 1/2 upwards.""",
        {"spread": "spread", "seeds": "seeds", "computed": "computed", "held": "held", "not held": "not held"},
    ),
)


def markdown(rows: Sequence[Row], *, command: str, source: str, spreads: Sequence[float], sweeps: int) -> str:
    """The whole page. What it concludes is computed from the rows."""
    found = ", ".join(f"{spread:.3f}" for spread in spreads)
    sections = [
        f"## {section.title}\n\n{section.text}\n\n{_table(rows_of(rows, section.part), section.columns)}\n"
        for section in _SECTIONS
    ]
    return f"""# Is the claims checker honest?

```bash
{command}
```

Made-up sweeps, {sweeps:,} a row, decided by the functions that decide real ones (`mha_jax.reporting.claims`). The
spread of a difference over seeds is that of a real sweep, `{source}`: each cell minus the base,
seed by seed, with standard deviations of {found} nats; the smallest, the middle and the largest
are used. Noise is normal where nothing else is said. Rates are shares of sweeps; 2.5 % is known to within 0.2 %.
All rows: [claims_simulation.csv](claims_simulation.csv).

{_conclusion(rows, spreads)}

![Sweeps with a claim held though none is true, and power](claims_simulation.png)

{chr(10).join(sections)}"""


def _conclusion(rows: Sequence[Row], spreads: Sequence[float]) -> str:
    planned = max(row["held"] for part in ("no effect", "claims") for row in rows_of(rows, part))
    added = max(row["held"] for row in rows_of(rows, "added seeds"))
    unguarded = max(row["held one by one"] for row in rows_of(rows, "claims"))
    noise = [r for r in rows_of(rows, "noise") if max(r["held"], r["held, cells swapped"]) > _BAR]
    beyond = ", ".join(dict.fromkeys(row["case"] for row in noise)) or "none"
    return f"""\
- No claim is true: one is called held in at most {_percent(planned)} of sweeps, with up to {max(CLAIMS)} claims and
  {SEEDS[0]} to {SEEDS[-1]} seeds (decided one by one it would be {_percent(unguarded)}), and in at most
  {_percent(added)} where seeds are added until one is.
- Noise under which that exceeds {_percent(_BAR)}: {beyond}.
- An effect of {EFFECT:.4f} nats is found with 80 % power, by a single claim, with
  {_needed(spreads)}."""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _needed(spreads: Sequence[float]) -> str:
    return ", ".join(f"{power.in_words(power.seeds_needed(EFFECT, s))} seeds (spread {s:.3f})" for s in spreads)


def _table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(name, row[name]) for name in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if name == "spread" else _percent(value)


def figure(rows: Sequence[Row], foot: str) -> bytes:
    """PNG with a line at its foot.

    Left: any claim held though none is true, by their number. Right: power by seeds, computed and simulated.
    """
    with mpl.rc_context(STYLE):
        drawn, axes = panels(1, 2, 3.9)
        _draw_error(axes[0, 0], rows_of(rows, "claims"))
        _draw_power(axes[0, 1], rows_of(rows, "effect"))
        drawn.text(0.008, 0.008, foot, fontsize=7, color=MUTED)
        out = io.BytesIO()
        drawn.savefig(out, format="png", dpi=160)
        return out.getvalue()


def _draw_error(axis: Axes, rows: Sequence[Row]) -> None:
    for marker, n in zip("os^", SEEDS, strict=True):
        found = [row for row in rows if row["seeds"] == str(n)]
        for name, colour, told in (("held one by one", PAPER, "one by one"), ("held", OURS, "the checker")):
            shares = [100 * row[name] for row in found]
            axis.plot(CLAIMS, shares, color=colour, marker=marker, markersize=5, label=f"{told}, {n} seeds")
    axis.axhline(100 * _BAR, color=MUTED, linestyle=":", linewidth=1)
    axis.set(xlabel="claims in a sweep, none of them true", ylabel="sweeps with a claim held (%)", xticks=CLAIMS)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def _draw_power(axis: Axes, rows: Sequence[Row]) -> None:
    spreads, seeds = sorted({row["spread"] for row in rows}), range(2, 16)
    for k, spread in enumerate(spreads):
        colour = RAMP(k / max(len(spreads) - 1, 1))
        computed = [100 * power.power(EFFECT, spread, n) for n in seeds]
        axis.plot(seeds, computed, color=colour, label=f"spread {spread:.3f}")
        found = [(int(row["seeds"]), 100 * row["held of 1"]) for row in rows if row["spread"] == spread]
        axis.plot(*zip(*found, strict=True), "o", color=colour, markersize=5)
    axis.axhline(100 * power.POWER, color=MUTED, linestyle=":", linewidth=1)
    axis.set(xlabel="seeds", ylabel=f"claim true by {EFFECT:.3f} nats held (%)", ylim=(0, 103))
    axis.legend(fontsize=8, title="lines computed, dots simulated", title_fontsize=8)
