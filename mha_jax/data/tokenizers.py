"""Text to token ids and back: raw bytes, byte-level BPE trained on the training split, or a tokenizer made elsewhere.

The first two begin with the four special tokens of `mha_jax.specs` (PAD 0, BOS 1, EOS 2, MASK 3), llama2.c's with the
first three of them; the others have theirs where their files say. Text that happens to spell a special token ("<eos>")
is ordinary text.

All have `encode(texts)`: the int32 ids of each, special tokens not added; and `decode(ids)`: their text, where special
tokens say nothing and bytes that are no UTF-8 become U+FFFD. `start` begins a stream of texts, `end` follows each text,
`mask` stands for one that is hidden (None where there is no such token); `specials` are the tokens that are no text;
`opens` says whether a text that is classified begins with `start`, `spaced` whether `encode` puts a space before it.
`path` is the file that holds a tokenizer which is more than a rule.
"""

from collections.abc import Iterable, Sequence
from typing import SupportsInt

import numpy as np
from etils import epath

from mha_jax.data.pieces import PieceTokenizer
from mha_jax.data.vocabularies import FileTokenizer
from mha_jax.specs import BOS, BYTE_VOCAB_SIZE, EOS, MASK, SPECIAL_TOKENS, UserError

_OFFSET = len(SPECIAL_TOKENS)


class ByteTokenizer:
    """id = 4 + byte."""

    name = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    start, end, mask, opens, spaced = BOS, EOS, MASK, False, False
    specials = frozenset(range(_OFFSET))
    path = None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + _OFFSET for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return bytes(i - _OFFSET for i in map(int, ids) if i >= _OFFSET).decode(errors="replace")


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in Radford et al. 2019): no text is unknown."""

    name = "bpe"
    start, end, mask, opens, spaced = BOS, EOS, MASK, False, False
    specials = frozenset(range(_OFFSET))

    def __init__(self, path: epath.Path):
        from tokenizers import Tokenizer as Backend

        self.path = path
        self._backend = Backend.from_str(path.read_text())
        # Not part of tokenizer.json. Without it "<eos>" inside a text would end the sentence.
        self._backend.encode_special_tokens = True
        self.vocab_size = self._backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._backend.decode([i for i in map(int, ids) if i >= _OFFSET], skip_special_tokens=True)


def train_bpe(texts: Iterable[str], vocab_size: int, path: epath.Path) -> BPETokenizer:
    """Learns merges of pairs seen at least twice and saves them to `path`.

    Raises: UserError where the text has too few pairs for `vocab_size`, with the size that it supports.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    supported = backend.get_vocab_size()
    if supported < vocab_size:
        raise UserError(
            f"data.vocab_size={vocab_size} is larger than the training text supports; at most {supported} fit"
        )
    path.write_text(backend.to_str())
    return BPETokenizer(path)


Tokenizer = ByteTokenizer | BPETokenizer | PieceTokenizer | FileTokenizer
