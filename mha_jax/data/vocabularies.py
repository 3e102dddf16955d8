"""Tokenizers made elsewhere, from their files, through the `tokenizers` library.

"wordpiece"  BERT's vocab.txt: a piece a line. Text is lowercased, and loses its accents, where no ordinary piece has
             a capital letter.
"gpt2"       vocab.json, with merges.txt beside it: byte-level byte-pair encoding (Radford et al. 2019)
"json"       the library's own tokenizer.json
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, SupportsInt

import numpy as np
from etils import epath

from mha_jax.specs import UserError

_ENDS = ("[SEP]", "</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>")
_STARTS = ("[CLS]", "<s>", "<|endoftext|>", "<bos>", "<|begin_of_text|>")
_MASKS = ("[MASK]", "<mask>")
_SPACES = ("▁", "Ġ")  # how SentencePiece and byte-level encoding write a space in a piece
_GPT2_END = "<|endoftext|>"


class FileTokenizer:
    """A tokenizer whose file says which tokens are special; `name` is its kind, `path` its tokenizer.json.

    Where the file puts tokens before and behind a text ([CLS] and [SEP]), these are `start` and `end`; else they are
    found by their usual names, and a text that nothing starts is started by the end of the one before it. `opens` says
    whether the file puts its start before every text, `spaced` whether it begins a text with a space of its own, as
    SentencePiece does.

    Raises: UserError for a number of tokens other than `vocab_size`, and for a file without a token that ends texts.
    """

    def __init__(self, name: str, path: epath.Path, vocab_size: int):
        from tokenizers import Tokenizer as Backend

        self.name, self.path, self.vocab_size = name, path, vocab_size
        self._backend: Any = Backend.from_str(path.read_text())
        self._backend.no_padding()
        self._backend.no_truncation()
        # Not part of tokenizer.json. Without it "[SEP]" inside a text would end it.
        self._backend.encode_special_tokens = True
        names = self._backend.get_vocab(with_added_tokens=True)
        if (count := max(names.values(), default=-1) + 1) != vocab_size:
            raise UserError(f"the file of data.tokenizer={name!r} has {count} tokens; data.vocab_size={vocab_size}")
        added = self._backend.get_added_tokens_decoder()
        self.specials = frozenset(number for number, token in added.items() if token.special)
        before, behind = self._around()
        self.opens = before is not None
        end = behind if behind is not None else _named(names, _ENDS)
        if end is None:
            own = ", ".join(added[number].content for number in sorted(self.specials)) or "none"
            raise UserError(
                f"the file of data.tokenizer={name!r} has no token that ends a text, such as {', '.join(_ENDS)}; "
                f"its special tokens: {own}"
            )
        start = before if before is not None else _named(names, _STARTS)
        self.start: int = end if start is None else start
        self.end: int = end
        self.mask: int | None = _named(names, _MASKS)
        (first, *_) = self._backend.encode("a", add_special_tokens=False).tokens or [""]
        self.spaced = first.startswith(_SPACES)

    def _around(self) -> tuple[int | None, int | None]:
        """What the file puts before and behind a text."""
        found = self._backend.encode("a")
        own = [place for place, special in enumerate(found.special_tokens_mask) if not special]
        if not own:
            return None, None
        first, last = own[0], own[-1]
        return found.ids[0] if first else None, found.ids[-1] if last + 1 < len(found.ids) else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._backend.decode([int(number) for number in ids], skip_special_tokens=True)


def _named(names: dict[str, int], wanted: tuple[str, ...]) -> int | None:
    return next((names[name] for name in wanted if name in names), None)


def files_of(kind: str, path: str) -> tuple[str, ...]:
    """The files that a tokenizer is read from, where `path` is its data.tokenizer_file."""
    return (path, str(epath.Path(path).parent / "merges.txt")) if kind == "gpt2" else (path,)


def as_json(kind: str, path: str) -> str:
    """The tokenizer.json of a tokenizer in whatever files it comes.

    Raises: UserError for files that are missing or no such tokenizer.
    """
    texts = [_text(name) for name in files_of(kind, path)]
    make = {"wordpiece": _wordpiece, "gpt2": _gpt2, "json": _checked}[kind]
    try:
        return make(*texts)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"data.tokenizer_file={path!r} is no {kind} tokenizer: {str(error).splitlines()[0]}") from None


def _text(path: str) -> str:
    file = epath.Path(path)
    if not file.exists() or file.is_dir():
        raise UserError(f"tokenizer {path} is no file")
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer {path} is not UTF-8: byte {error.start}") from None


def _checked(text: str) -> str:
    from tokenizers import Tokenizer as Backend

    Backend.from_str(text)
    return text


def _wordpiece(text: str) -> str:
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    pieces = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if vocabulary.setdefault(piece, number) != number:
            raise UserError(f"the vocabulary of data.tokenizer='wordpiece' has {piece!r} again in line {number + 1}")
    cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    return BertWordPieceTokenizer(vocabulary, lowercase=not cased).to_str()


def _gpt2(vocabulary: str, merges: str) -> str:
    from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer

    names = json.loads(vocabulary)
    if _GPT2_END not in names:
        raise UserError(f"the vocabulary of data.tokenizer='gpt2' has no {_GPT2_END!r}")
    lines = [line for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
    pairs = [(first, second) for first, second in (line.rstrip("\r").split(" ") for line in lines)]
    backend = ByteLevelBPETokenizer(names, pairs)
    backend.add_special_tokens([_GPT2_END])
    return backend.to_str()
