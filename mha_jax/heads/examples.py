"""Single examples of a run's data, with the names of their tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mha_jax.data.texts import pieces
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.heads.capture import Batch, num_examples, real_queries
from mha_jax.models.transformer import Model
from mha_jax.specs import UserError

_INPUTS = {"encoder": ("source", "inputs"), "decoder": ("target_inputs", "inputs")}


class Example(NamedTuple):
    """One example: its name, a batch that holds it alone, and {"encoder" or "decoder": its tokens without padding}."""

    name: str
    batch: Batch
    tokens: dict[str, list[str]]

    def sides(self, kind: str) -> tuple[list[str], list[str]]:
        """The tokens of the queries and of the keys of an attention of this kind."""
        queries, keys = ("decoder", "encoder") if kind == "cross" else (kind, kind)
        return self.tokens[queries], self.tokens[keys]


def example(name: str, model: Model, batch: Batch, tokenizer: Tokenizer) -> Example:
    """A batch of one example with its tokens named."""
    tokens = {}
    for stack, length in _lengths(model, batch).items():
        ids_BT = next(batch[field] for field in _INPUTS[stack] if field in batch)
        tokens[stack] = pieces(tokenizer, np.asarray(ids_BT)[0, :length])
    return Example(name, batch, tokens)


def numbered(
    batches: Iterable[Batch], model: Model, tokenizer: Tokenizer, split: str, numbers: Sequence[int]
) -> list[Example]:
    """The examples of these numbers, from 0 in the order of the batches, not counting those that only fill a batch.

    Raises: UserError for a number that there is not.
    """
    found, count = {}, 0
    for batch in batches:
        rows = list(_real_rows(model, batch))
        for number in {n for n in numbers if count <= n < count + len(rows)}:
            row = rows[number - count]
            one = {field: leaf[row : row + 1] for field, leaf in batch.items()}
            found[number] = example(f"{split} {number}", model, one, tokenizer)
        count += len(rows)
        if len(found) == len(set(numbers)):
            break
    for number in numbers:
        if number not in found:
            raise UserError(f"{split} has no example {number}; there are {count}, 0 to {count - 1}")
    return [found[number] for number in numbers]


def _real_rows(model: Model, batch: Batch) -> Iterator[int]:
    weights = np.asarray(batch["weights"]).reshape(num_examples(model, batch), -1)
    return (row for row in range(len(weights)) if weights[row].any())


def _lengths(model: Model, batch: Batch) -> dict[str, int]:
    """How many positions of each stack are no padding, in a batch of one row."""
    lengths = {}
    for stack, real_BT in real_queries(model, batch).items():
        if hasattr(model, stack):
            (places,) = np.nonzero(np.asarray(real_BT)[0])
            lengths[stack] = int(places[-1]) + 1 if len(places) else 0
    return lengths
