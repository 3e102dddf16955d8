"""Which tokens a masked language model is asked for, and what stands in their place: BERT's rule."""

import numpy as np

from mha_jax.data.batches import Batch
from mha_jax.data.tokenizers import Tokenizer
from mha_jax.specs import UserError

_SHARE = 0.15
_SALT = 2**31 - 1  # no bucket's: `schedule` draws orders of rows from the same seeds


class Masking:
    """Hides tokens of a batch (Devlin et al. 2019, section 3.1, task 1, and appendix A.1).

    Of the ordinary tokens of a row 15 % are predicted, rounded, and at least one. Of these 80 % become the mask token,
    10 % an ordinary token drawn evenly from the vocabulary, 10 % stay as they are. Special tokens are neither predicted
    nor drawn.

    Training hides other tokens at each (seed, step); evaluation hides the same ones of a row each time, whatever the
    batch that it is in, so that losses of models on the same data compare.

    Raises: UserError for a tokenizer without a mask token.
    """

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.mask is None:
            raise UserError(f"task='masked_lm' needs a mask token; the tokenizer {tokenizer.name!r} has none")
        self._mask = tokenizer.mask
        self._is_ordinary = np.ones(tokenizer.vocab_size, bool)
        self._is_ordinary[list(tokenizer.specials)] = False
        self._ordinary = np.flatnonzero(self._is_ordinary)

    def hide(self, batch: Batch, rows: np.ndarray, seed_step: tuple[int, int] | None) -> Batch:
        """The batch with "inputs" in which tokens are hidden, and "weights" 1 where they are.

        Args: rows: their places in the split. seed_step: of training; None for evaluation.
        """
        choice_BT, fate_BT, other_BT = _uniform(rows, batch["inputs"].shape[1], seed_step)
        may_BT = self._is_ordinary[batch["inputs"]] & (batch["weights"] > 0)
        count_B = may_BT.sum(axis=1)
        wanted_B = np.minimum(np.maximum(np.rint(_SHARE * count_B), 1), count_B)
        rank_BT = np.argsort(np.argsort(np.where(may_BT, choice_BT, np.inf), axis=1), axis=1)
        chosen_BT = rank_BT < wanted_B[:, None]
        drawn_BT = self._ordinary[(other_BT * len(self._ordinary)).astype(np.int32)]
        instead_BT = np.where(fate_BT < 0.8, self._mask, np.where(fate_BT < 0.9, drawn_BT, batch["inputs"]))
        inputs = np.where(chosen_BT, instead_BT, batch["inputs"]).astype(np.int32)
        return {**batch, "inputs": inputs, "weights": chosen_BT.astype(np.float32)}


def _uniform(rows: np.ndarray, length: int, seed_step: tuple[int, int] | None) -> np.ndarray:
    """[3, B, length] between 0 and 1: which tokens, what becomes of them, which others are put there."""
    if seed_step is not None:
        seed, step = seed_step
        return np.random.default_rng([seed % 2**64, _SALT, step]).random((3, len(rows), length))
    drawn = [np.random.default_rng([_SALT, row]).random((3, length)) for row in np.maximum(rows, 0).tolist()]
    return np.stack(drawn, axis=1)
