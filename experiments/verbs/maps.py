"""Attention maps of single texts: `python -m experiments.heads maps --run=DIR/runs/NAME [--other=DIR/runs/NAME2]`.

Texts are --examples of a split, counted from 0, or one of your own: --text, and for a translation model --source and
--target. Writes RUN/heads/maps.html, one page of every chosen layer and head that needs no network, with a second run
beside the first where --other names one, and RUN/heads/maps/ATTENTION-TEXT.svg and .pdf, a picture a layer.
"""

import itertools
from collections.abc import Iterator, Sequence

from absl import flags

from experiments import cli, texts
from mha_jax.heads.capture import attentions, check_numbers, chosen_layers, kind_of
from mha_jax.heads.examples import Example
from mha_jax.heads.maps import example_maps
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError
from mha_jax.sweeps.opening import OpenedRun, chosen_seeds, open_run


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    texts.define(values, "Attentions, such as encoder/0/attention; default: all.")
    flags.DEFINE_string("other", None, "Another run, shown beside this one.", flag_values=values)
    flags.DEFINE_enum("pool", "max", ["max", "mean"], "What a long map is told by at a glance.", flag_values=values)
    flags.DEFINE_integer("flow_tokens", 32, "Attention flow of texts of at most so many tokens.", flag_values=values)
    flags.DEFINE_float("residual", 0.5, "Share of the residual stream in rollout and flow.", flag_values=values)
    cli.parse(values, argv, __doc__)
    texts.check(values)
    if not 0 <= values.residual <= 1:
        raise UserError(f"--residual={values.residual:g} must lie between 0 and 1: the share of the residual stream")
    runs = [open_run(path) for path in (values.run, values.other) if path is not None]
    _write(runs, values)
    return 0


def _write(runs: list[OpenedRun], values: flags.FlagValues) -> None:
    from mha_jax.reporting import maps as report  # matplotlib takes seconds to import
    from mha_jax.reporting.heads import write_page

    opened = runs[0]
    models = [one.model(chosen_seeds(one, values.seed)[0]) for one in runs]
    examples = [texts.examples(one, model, values) for one, model in zip(runs, models, strict=True)]
    heads = texts.numbers(values, "heads")
    for model, those in zip(models, examples, strict=True):
        report.check_size(_shapes(model, those, values.layers, heads))
    if values.text is None and values.source is None and len(runs) > 1:
        _check_same(examples, runs)
    pictures, shown = opened.directory.path / "heads" / "maps", []
    pictures.mkdir(parents=True, exist_ok=True)
    for one, model, those in zip(runs, models, examples, strict=True):
        about = f"step {one.step} · seed {chosen_seeds(one, values.seed)[0]}"
        made = []
        for number, example in enumerate(those):
            found = example_maps(
                model,
                example,
                layers=values.layers,
                heads=heads,
                flow_tokens=values.flow_tokens,
                residual=values.residual,
            )
            for _, group in itertools.groupby(found, lambda one: one.attention):
                maps = list(group)
                if one is opened:
                    report.draw(example, maps, f"{one.directory.run_id} · {about} · {example.name}", pictures)
                made += [report.page_map(number, one, values.pool) for one in maps]
        shown.append(report.Shown(one.directory.run_id, about, those, made))
        print(f"{one.directory.run_id}, {about}: {len(made)} maps of {', '.join(one.name for one in those)}")
    page = opened.directory.path / "heads" / "maps.html"
    page.write_text(report.page(shown))
    print(f"maps: {page}, and as pictures {pictures}\npage: {write_page(opened.directory.path)}")


def _shapes(
    model: Model, examples: Sequence[Example], layers: Sequence[str] | None, heads: Sequence[int] | None
) -> Iterator[tuple[int, int]]:
    """Of the maps of single heads, by far the most."""
    for example, name in itertools.product(examples, chosen_layers(model, layers)):
        count = attentions(model)[name].shape.num_heads
        check_numbers(f"{name} has no head", heads, count)
        queries, keys = example.sides(kind_of(name))
        yield from [(len(queries), len(keys))] * (count if heads is None else len(heads))


def _check_same(examples: list[list[Example]], runs: list[OpenedRun]) -> None:
    """Heads of two runs are set side by side on the same tokens."""
    for one, other in zip(*examples, strict=True):
        if one.tokens != other.tokens:
            raise UserError(
                f"{one.name} is another text in {runs[1].directory.run_id} than in {runs[0].directory.run_id}; "
                "give both the same --text, or name a run with the same data and tokenizer as --other"
            )
