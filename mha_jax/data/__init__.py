"""Data: TFDS sets by name, text files, parallel files and an embedded corpus, as batches that are f(seed, step).

Imports no TFDS and no tokenizer until a set has to be prepared or read.
"""

from mha_jax.data.pipeline import Data, Share, batch_shapes, load
from mha_jax.data.tokenizers import Tokenizer

__all__ = ["Data", "Share", "Tokenizer", "batch_shapes", "load"]
