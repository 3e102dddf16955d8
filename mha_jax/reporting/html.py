"""The report page: one file that needs nothing else, by day and by night."""

import re
from pathlib import Path
from typing import Any

import jinja2

from mha_jax.reporting import planned
from mha_jax.reporting.canvas import INK, MUTED, PAGE, RULE, Picture
from mha_jax.reporting.claims import Verdict
from mha_jax.reporting.interpretability_page import Section
from mha_jax.reporting.provenance import caption
from mha_jax.reporting.results import Results
from mha_jax.reporting.seeds import SeedTable
from mha_jax.reporting.tables import Table

# What a second of a run was spent on, in the order of the bar. The first two are what a run is for.
PARTS = ("train", "eval", "compile", "imports", "data", "save", "other")


def page(
    results: Results,
    table: Table,
    seed_table: SeedTable | None,
    verdicts: list[Verdict],
    pictures: list[Picture],
    interpretability: Section | None = None,
) -> str:
    """The whole HTML text."""
    question, _, rest = str(results.sweep.get("docstring") or "").strip().partition("\n")
    return template("page.html.jinja").render(
        question=question or str((results.sweep.get("base_config") or {}).get("name", "A sweep")),
        docstring=rest.strip("\n"),
        progress=_progress(results),
        verdicts=verdicts,
        table=table,
        seed_table=seed_table,
        pictures=[_shown(picture) for picture in pictures],
        interpretability=interpretability,
        interpretability_picture=interpretability and _shown(interpretability.picture),
        cells=[
            {"label": label, "run": run.run, "state": run.state, "summary": run.summary}
            | ({"heads": f"../runs/{run.run}/heads/index.html"} if run.has_heads else {})
            | ({"atlas": f"../runs/{run.run}/heads/atlas.html"} if run.has_atlas else {})
            for label, run in zip(results.labels, results.runs, strict=True)
        ],
        parts=PARTS,
        budget=_budget(results),
        plan=[planned.text(row) for row in planned.rows(results)],
        plan_basis=planned.basis(results),
        provenance=caption(results),
        problems=results.problems,
        tuned=results.tuning is not None,
        incidents=results.incidents,
    )


def template(name: str) -> jinja2.Template:
    """A template of this folder."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def inline(picture: Picture) -> str:
    """The SVG for the page: its greys follow the page's theme, its ids cannot clash, its text is told to readers."""
    svg = picture.svg[picture.svg.index("<svg") :]
    for grey, name in ((INK, "ink"), (MUTED, "muted"), (RULE, "rule"), (PAGE, "page")):
        svg = svg.replace(grey, f"var(--{name})")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{picture.name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{picture.title}" ', 1)


def _shown(p: Picture) -> dict[str, str]:
    return {"name": p.name, "title": p.title, "caption": p.caption, "svg": inline(p)}


def _progress(results: Results) -> str:
    states = [cell.state for cell in results.cells]
    parts = [f"{states.count('done')} of {len(states)} cells done"]
    parts += [f"{n} {s}" for s in ("running", "stopped", "queued", "failed", "illegal") if (n := states.count(s))]
    return " · ".join(parts)


def _budget(results: Results) -> list[dict[str, Any]]:
    """Where each run's time went. A run that did not account for its time is left out."""
    budget = []
    for label, run in zip(results.labels, results.runs, strict=True):
        seconds = {part: float(run.status.get("seconds", {}).get(part, 0.0)) for part in PARTS}
        total = sum(seconds.values())
        if total > 0:
            outside = total - seconds["train"] - seconds["eval"]
            budget.append(
                {
                    "label": label,
                    "seconds": seconds,
                    "total": total,
                    "share": {part: 100 * value / total for part, value in seconds.items()},
                    "outside": 100 * outside / total,
                }
            )
    return budget
