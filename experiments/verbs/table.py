"""Does more heads buy quality, or heads that a person can read? `python -m experiments.heads table --workdir=DIR`.

Sets the metric of each cell of a sweep beside what the verbs `roles`, `redundancy`, `importance`, `curve` and `probe`
found in its runs (`all` runs them), with n seeds, 95 % t intervals and differences to the base paired by seed. Writes
DIR/report/interpretability.{md,csv,svg,png}, and a section of DIR/report/index.html, which is made anew.
"""

from absl import flags

from experiments import cli
from mha_jax.specs import UserError


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Directory of a sweep.", flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.workdir:
        raise UserError("--workdir is missing: the directory of a sweep, for instance runs/default")
    # matplotlib takes seconds to import
    from mha_jax.reporting import build_report, interpretability, results

    if interpretability.make(results.read(values.workdir), values.workdir) is None:
        raise UserError(
            f"no finished run of {values.workdir} has been looked into; "
            f"python -m experiments.heads all --workdir={values.workdir} does that"
        )
    page = build_report(values.workdir)
    print((page.parent / "interpretability.md").read_text())
    print(f"report: {page}")
    return 0
