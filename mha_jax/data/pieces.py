"""The tokenizer of llama2.c: byte-pair encoding by the scores of pieces, as in SentencePiece, with bytes for the rest.

Its file ("tokenizer.bin") is little-endian: the int32 length of the longest piece, then for each id a float32 score,
an int32 length and the piece's bytes. Ids 0, 1 and 2 are unknown, start and end; 3 to 258 are the 256 bytes.
"""

import heapq
import math
import struct
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import numpy as np
from etils import epath

from mha_jax.specs import BOS, UserError

_LENGTH, _PIECE = struct.Struct("<i"), struct.Struct("<fi")
_FIRST_BYTE = 3
_FIRST_PIECE = _FIRST_BYTE + 256


class PieceTokenizer:
    """Text to pieces and back, as llama2.c does: a text begins with a space of its own, which decoding drops.

    The start token parts texts, in place of EOS: llama2.c's training data has no end token.

    Raises: UserError for a file that is no such tokenizer, or whose number of pieces is not `vocab_size`.
    """

    name = "llama2c"
    start, end, mask, opens, spaced = BOS, BOS, None, False, True
    specials = frozenset(range(_FIRST_BYTE))

    def __init__(self, path: epath.Path, vocab_size: int):
        self.path, self.vocab_size = path, vocab_size
        pieces, self._scores = read_pieces(path)
        if len(pieces) != vocab_size:
            raise UserError(f"tokenizer {path} has {len(pieces)} pieces; data.vocab_size={vocab_size}")
        self._ids = {piece: number for number, piece in enumerate(pieces) if number >= _FIRST_PIECE}
        self._texts = [b""] * _FIRST_BYTE + [bytes([byte]) for byte in range(256)] + pieces[_FIRST_PIECE:]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(self._merged(self._letters(" " + text)) if text else [], np.int32) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        written, starts = [], True
        for number in map(int, ids):
            piece = self._texts[number]
            written.append(piece.removeprefix(b" ") if starts else piece)
            starts = number < _FIRST_BYTE
        return b"".join(written).decode(errors="replace")

    def _letters(self, text: str) -> list[int]:
        ids: list[int] = []
        for letter in text:
            piece = letter.encode()
            ids += [self._ids[piece]] if piece in self._ids else [_FIRST_BYTE + byte for byte in piece]
        return ids

    def _merged(self, ids: list[int]) -> list[int]:
        """Neighbours merged, the pair of the best score first and of equals the leftmost, until no pair is a piece.

        A queue of pairs over linked places, so that time grows with n log n; pairs that are gone are passed over.
        """
        following = [*range(1, len(ids)), -1]
        before = [*range(-1, len(ids) - 1)]
        queue: list[tuple[float, int, int, int, int]] = []

        def offer(left: int) -> None:
            right = following[left] if left >= 0 else -1
            if right < 0 or min(ids[left], ids[right]) < _FIRST_PIECE:
                return
            merged = self._ids.get(self._texts[ids[left]] + self._texts[ids[right]])
            if merged is not None:
                heapq.heappush(queue, (-self._scores[merged], left, ids[left], ids[right], merged))

        for place in range(len(ids)):
            offer(place)
        while queue:
            _, left, left_id, right_id, merged = heapq.heappop(queue)
            right = following[left]
            if ids[left] != left_id or right < 0 or ids[right] != right_id:
                continue
            ids[left], ids[right], following[left] = merged, -1, following[right]
            if following[right] >= 0:
                before[following[right]] = left
            offer(before[left])
            offer(left)
        return [number for number in ids if number >= 0]


def read_pieces(path: epath.Path) -> tuple[list[bytes], list[float]]:
    """Pieces and scores of a tokenizer.bin by id; those of ids below 259 are only names.

    Raises: UserError for a file that is none, or not whole.
    """
    if not path.exists() or path.is_dir():
        raise UserError(f"tokenizer {path} is no file")
    raw = path.read_bytes()
    pieces, scores, place = [], [], _LENGTH.size
    while place + _PIECE.size <= len(raw):
        score, size = _PIECE.unpack_from(raw, place)
        start = place + _PIECE.size
        if not 0 <= size <= len(raw) - start or not math.isfinite(score):
            break
        pieces.append(raw[start : start + size])
        scores.append(score)
        place = start + size
    if place != len(raw) or len(pieces) < _FIRST_PIECE or _LENGTH.unpack_from(raw)[0] != max(map(len, pieces)):
        raise UserError(f"{path} is no whole llama2.c tokenizer: it has {len(raw)} bytes, {len(pieces)} pieces")
    return pieces, scores
