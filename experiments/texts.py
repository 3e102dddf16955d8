"""What `capture` and `maps` share: which texts, layers and heads are looked at."""

from absl import flags

from mha_jax.data.texts import text_batch
from mha_jax.heads.examples import Example, example, numbered
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError
from mha_jax.sweeps.opening import OpenedRun


def define(values: flags.FlagValues, layers: str) -> None:
    flags.DEFINE_string("run", None, "The directory of a finished run.", flag_values=values)
    flags.DEFINE_integer("seed", None, "One of its seeds; default: the first.", flag_values=values)
    flags.DEFINE_list("layers", None, layers, flag_values=values)
    flags.DEFINE_list("heads", None, "Numbers of heads, from 0; default: all.", flag_values=values)
    flags.DEFINE_string("split", "validation", "Split whose examples are read.", flag_values=values)
    flags.DEFINE_list("examples", ["0"], "Their numbers, from 0.", flag_values=values)
    flags.DEFINE_string("text", None, "A text that is read instead.", flag_values=values)
    flags.DEFINE_string("source", None, "The same for a translation model, with --target.", flag_values=values)
    flags.DEFINE_string("target", None, "What its decoder reads.", flag_values=values)


def check(values: flags.FlagValues) -> None:
    """Raises UserError for flags that do not go together, before a run is opened."""
    if not values.run:
        raise UserError("--run is missing: the directory of a finished run, for instance runs/default/runs/NAME")
    if (values.source is None) != (values.target is None) or (values.text and values.source):
        raise UserError("give --text, or --source and --target for a translation model, or neither for --examples")
    numbers(values, "heads")
    numbers(values, "examples")


def numbers(values: flags.FlagValues, name: str) -> list[int] | None:
    """A flag's list of numbers from 0."""
    given = values[name].value
    if given is None:
        return None
    if not given or not all(text.strip().isdecimal() for text in given):
        raise UserError(f"--{name}={','.join(given)} is not understood; it reads 0,3")
    return [int(text) for text in given]


def examples(opened: OpenedRun, model: Model, values: flags.FlagValues) -> list[Example]:
    """The texts that the flags name."""
    tokenizer, text = opened.data.tokenizer, values.text or values.source
    if text is None:
        wanted = numbers(values, "examples") or []
        return numbered(opened.batches(values.split), model, tokenizer, values.split, wanted)
    length = opened.run.model.max_length
    batch = text_batch(tokenizer, opened.run.task, length, text, values.target)
    return [example("text", model, batch, tokenizer)]
