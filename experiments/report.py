"""Tables, figures and a page from what a sweep has so far: `python -m experiments.report --workdir=DIR`."""

from absl import flags

from experiments import cli
from mha_jax.specs import UserError


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Directory of a sweep.", flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.workdir:
        raise UserError("--workdir is missing: the directory of a sweep, for instance runs/default")
    from mha_jax.reporting import build_report  # matplotlib takes seconds to import

    page = build_report(values.workdir)
    print((page.parent / "table.md").read_text())
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    cli.run(main)
