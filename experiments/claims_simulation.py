"""How often the claims checker is wrong, and what it finds: `python -m experiments.claims_simulation --out=docs`.

Writes claims_simulation.md, .csv and .png there. The spread over seeds is taken from the results.csv of a sweep.
"""

import shlex
from pathlib import Path

from absl import flags

from experiments import cli
from mha_jax.specs import UserError

_RESULTS = "docs/results/vaswani2017_table3_multi30k.csv"


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "Directory of the page.", flag_values=values)
    flags.DEFINE_string("results", _RESULTS, "results.csv whose spread over seeds is used.", flag_values=values)
    flags.DEFINE_integer("sweeps", 40_000, "Sweeps a row.", lower_bound=100, flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.out:
        raise UserError("--out is missing: the directory that the page goes to, for instance docs")
    from mha_jax.reporting import formats, simulation, simulation_page  # matplotlib takes seconds to import

    spreads = simulation.measured_spreads(Path(values.results))
    rows = simulation.simulate(spreads, values.sweeps)
    foot = f"{values.sweeps:,} made-up sweeps a row, spread over seeds from {values.results}"
    out = Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "claims_simulation.csv").write_text(formats.rows_as_csv(rows))
    (out / "claims_simulation.png").write_bytes(simulation_page.figure(rows, foot))
    command = shlex.join(["python", "-m", "experiments.claims_simulation", *argv[1:]])
    page = simulation_page.markdown(rows, command=command, source=values.results, spreads=spreads, sweeps=values.sweeps)
    (out / "claims_simulation.md").write_text(page)
    print(out / "claims_simulation.md")
    return 0


if __name__ == "__main__":
    cli.run(main)
