"""The data's section: source, tokens, static shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mha_jax.specs.checks import UserError, at_least, choice

PAD, BOS, EOS, MASK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")
BYTE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# Tokenizers that are read from data.tokenizer_file.
FILE_TOKENIZERS = ("llama2c", "wordpiece", "gpt2", "json")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Where tokens come from, and the static shapes that they are packed into.

    `tokenizer_file`: llama2.c's tokenizer.bin, BERT's vocab.txt ("wordpiece"), GPT-2's vocab.json beside its merges.txt
    ("gpt2"), or a tokenizer.json ("json"); `vocab_size` says how many tokens it has.
    """

    source: Literal["embedded", "text", "parallel", "labelled", "tfds"]
    length: int
    batch_size: int
    tokenizer: Literal["bytes", "bpe", "llama2c", "wordpiece", "gpt2", "json"] = "bytes"
    vocab_size: int | None = None
    tokenizer_file: str | None = None
    files: Mapping[str, Any] | None = None
    tfds_name: str | None = None
    languages: tuple[str, str] | None = None  # source and target; None: the order that the TFDS set itself gives
    validation_fraction: float = 0.05
    segments: bool = False
    batch_tokens: int | None = None
    buckets: tuple[int, ...] | None = None
    num_classes: int | None = None
    max_examples: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        choice("data.source", self.source, ("embedded", "text", "parallel", "labelled", "tfds"))
        choice("data.tokenizer", self.tokenizer, ("bytes", "bpe", *FILE_TOKENIZERS))
        at_least("data.length", self.length, 2)
        at_least("data.batch_size", self.batch_size, 1)
        if self.tokenizer in ("bpe", "llama2c"):
            at_least("data.vocab_size", self.vocab_size, BYTE_VOCAB_SIZE)
        elif self.tokenizer in FILE_TOKENIZERS:
            at_least("data.vocab_size", self.vocab_size, 2)
        elif self.vocab_size not in (None, BYTE_VOCAB_SIZE):
            raise UserError(
                f"data.vocab_size={self.vocab_size} does not fit data.tokenizer='bytes', "
                f"which has {BYTE_VOCAB_SIZE}; leave it out or use 'bpe'"
            )
        if (self.tokenizer in FILE_TOKENIZERS) != bool(self.tokenizer_file):
            raise UserError(
                f"data.tokenizer_file={self.tokenizer_file!r} does not fit data.tokenizer={self.tokenizer!r}: "
                f"{', '.join(map(repr, FILE_TOKENIZERS))} are read from a file, 'bytes' and 'bpe' are not"
            )
        if self.source in ("text", "parallel", "labelled") and not (self.files and self.files.get("train")):
            raise UserError(f"data.source={self.source!r} needs data.files.train")
        if self.source == "tfds" and not self.tfds_name:
            raise UserError("data.source='tfds' needs data.tfds_name, for instance 'wmt14_translate/de-en'")
        for field in ("batch_tokens", "num_classes", "max_examples"):
            if getattr(self, field) is not None:
                at_least(f"data.{field}", getattr(self, field), 1)
        if not 0 < self.validation_fraction < 0.5:
            raise UserError(f"data.validation_fraction={self.validation_fraction!r} must be above 0 and below 0.5")
        for bucket in self.buckets or ():
            at_least("data.buckets", bucket, 2)
        if self.buckets and (list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] != self.length):
            raise UserError(f"data.buckets={self.buckets} must rise and end at data.length={self.length}")

    @property
    def tokens(self) -> int:
        """Size of the vocabulary, the special tokens included."""
        return BYTE_VOCAB_SIZE if self.vocab_size is None else self.vocab_size
