"""Everything that `report/` holds, made anew from what the sweep directory has at the moment."""

from etils import epath

from mha_jax.reporting import (
    claims,
    formats,
    html,
    interpretability,
    interpretability_page,
    planned,
    plots,
    provenance,
    results,
    seeds,
    tables,
    trials,
    tuning,
)
from mha_jax.sweeps.claims import parse


def build_report(workdir: epath.PathLike) -> epath.Path:
    """Writes DIR/report: index.html, table.{md,csv,tex}, results.csv and the figures. Returns the path of the page.

    Where heads of a finished run have been looked into, also interpretability.{md,csv,svg,png}.

    May be called at any moment, also while runs train: what is not finished is listed with its reason.

    Raises: UserError where the directory holds no sweep, or a claim of its config cannot be understood.
    """
    found = results.read(workdir)
    verdicts = claims.check([parse(claim) for claim in found.sweep.get("claims") or []], found)
    table, caption = tables.make(found), provenance.caption(found)
    directory = epath.Path(workdir) / "report"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(formats.markdown(table, verdicts, caption))
    (directory / "table.csv").write_text(formats.csv_text(table, seeds.columns(found, table)))
    (directory / "table.tex").write_text(formats.latex(table, caption))
    (directory / "results.csv").write_text(formats.rows_as_csv(found.rows()))
    pictures = plots.draw(found, table, directory)
    if found.tuning is not None:
        (directory / "tuning.csv").write_text(formats.rows_as_csv(trials.rows(found)))
        pictures += filter(None, [tuning.draw(found, directory)])
    plan = planned.rows(found)
    if plan:
        (directory / "plan.csv").write_text(formats.rows_as_csv(plan))
    heads = interpretability.make(found, workdir)
    section = heads and interpretability_page.section(heads, provenance.footer(found), directory)
    if heads and section:
        (directory / "interpretability.md").write_text(interpretability_page.markdown(section))
        (directory / "interpretability.csv").write_text(formats.rows_as_csv(interpretability.as_rows(heads)))
    page = directory / "index.html"
    page.write_text(html.page(found, table, seeds.make(found, table), verdicts, pictures, section))
    return page
