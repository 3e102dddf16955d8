"""The atlas of a run's heads: `python -m experiments.heads atlas --run=DIR/runs/NAME [--examples=1]`.

Layers by heads, each with its role (of roles.json), what it costs to cut and its importance (importance.json), the
entropy of its attention over --batches of a split, and its map of one text; a file that is not there leaves its numbers
out. Writes RUN/heads/atlas.html, one page that needs no network, and atlas.svg/.png.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import flags

from experiments import cli, texts
from experiments.verbs.importance import even_batches
from mha_jax.heads.capture import attentions, head_statistics, kind_of
from mha_jax.heads.maps import example_maps
from mha_jax.specs import UserError
from mha_jax.sweeps.opening import OpenedRun, chosen_seeds, open_run
from mha_jax.sweeps.store import read_json

if TYPE_CHECKING:
    from mha_jax.models.transformer import Model

_TABLES = {"relations.csv": "relations", "coreference.csv": "antecedents", "probes.csv": "probes"}
_statistics = jax.jit(head_statistics)


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    texts.define(values, "Attentions, such as encoder/0/attention; default: all.")
    flags.DEFINE_integer("batches", 4, "Batches of the split that the entropy is a mean over.", 1, flag_values=values)
    cli.parse(values, argv, __doc__)
    texts.check(values)
    if len(values.examples) > 1:
        raise UserError(f"--examples={','.join(values.examples)} are {len(values.examples)}; an atlas shows one text")
    _write(values)
    return 0


def _write(values: flags.FlagValues) -> None:
    from mha_jax.reporting import atlas, maps  # matplotlib takes seconds to import
    from mha_jax.reporting.heads import write_page

    opened = open_run(values.run)
    seed = chosen_seeds(opened, values.seed)[0]
    model = opened.model(seed)
    [example] = texts.examples(opened, model, values)
    maps.check_size(
        (len(queries), len(keys))
        for name, attention in attentions(model).items()
        for queries, keys in [example.sides(kind_of(name))] * attention.shape.num_heads
    )
    entropies = _entropies(opened, model, values)
    found = example_maps(model, example, layers=values.layers, heads=texts.numbers(values, "heads"), flow_tokens=0)
    directory = opened.directory.path / "heads"
    told = {name: read_json(file) for name in ("roles", "importance") if (file := directory / f"{name}.json").exists()}
    single = [one for one in found if isinstance(one.head, int)]
    made = atlas.cells(single, entropies, seed, told.get("roles"), told.get("importance"))
    directory.mkdir(parents=True, exist_ok=True)
    about = f"step {opened.step} · seed {seed}"
    links = [(file, text) for file, text in _TABLES.items() if (directory / file).exists()]
    (directory / "atlas.html").write_text(atlas.page(opened.directory.run_id, about, example, made, links))
    atlas.draw(made, f"{opened.directory.run_id}  ·  {about}  ·  {example.name}", directory)
    print(f"atlas: {directory / 'atlas.html'}, {len(made)} heads\npage: {write_page(opened.directory.path)}")


def _entropies(opened: OpenedRun, model: "Model", values: flags.FlagValues) -> dict[str, list[float]]:
    """{attention: nats of each head}, the mean over real queries."""
    found = [jax.device_get(_statistics(model, batch)) for batch in even_batches(opened, values.split, values.batches)]
    mean = {}
    for name in attentions(model):
        queries = max(sum(float(one[name].count) for one in found), 1.0)
        mean[name] = (np.sum([one[name].sums.entropy for one in found], axis=0) / queries).tolist()
    return mean
