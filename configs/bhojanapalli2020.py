"""Bhojanapalli et al. 2020, "Low-Rank Bottleneck in Multi-head Attention Models": head size d/h against a fixed one.

Question:    does splitting d_model over more heads hurt because a head becomes narrower than the text is long?
Scientific:  num_heads with qk_dim = v_dim = d_model / num_heads ("d/h", parameters constant), and with a fixed
             qk_dim = v_dim ("fixed", parameters grow with heads).
Nuisance:    the seed: three a cell, compared seed by seed.
Fixed:       depth, d_model, d_ff, text length n, batch, steps; nothing is tuned per cell.
Decides:     validation/loss in nats a token; the paper's tables have SQuAD F1 after BERT pretraining.

  --config=configs/bhojanapalli2020.py:paper     the paper's language model: LM1B of TFDS, 6 layers, d_model 256,
                                                 n = 256, fixed size 32. It has figures without numbers; steps and
                                                 optimizer are ours. Its tables need masked-word pretraining.
  --config=configs/bhojanapalli2020.py:embedded  2 layers, d_model 128, n = 32 bytes, fixed size 32 = n: as in table 1
                                                 the first count has heads as wide as the text is long. About 15
                                                 minutes on two CPU cores.

Rows are matched by head size over n (d/h) and by h * size / d (fixed). The theorem itself is exact, and takes seconds:

  python -c "from mha_jax.heads import rank; x, p = rank.random_case(8, 16); print(rank.least_rank(p), \\
             abs(rank.exact_head(x, p, 8).attention(x) - p).max(), rank.least_error(p, 4), rank.fitted_gap(x, p, 4))"

prints 7, a rounding error, and two numbers that are not small: heads of 8 and of 4 over 8 tokens; mha_jax/heads/rank.py
says what they are.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import default
from mha_jax.specs import UserError

_SIZE = 32  # of a fixed head, in both profiles
# The first count is the base, where d / h is the fixed size.
_COUNTS = {"paper": (8, 4, 16, 32, 64), "embedded": (4, 8, 16, 32)}


def get_config(profile: str = "paper") -> ConfigDict:
    if profile not in ("", "paper", "embedded"):
        raise UserError(f"unknown profile {profile!r} of configs/bhojanapalli2020.py; known are 'paper' and 'embedded'")
    config = default.get_config().unlock()
    config.name = f"bhojanapalli2020-{profile or 'paper'}"
    config.model.num_heads = _COUNTS[profile or "paper"][0]
    if profile == "embedded":
        config.data.update(length=32, batch_size=16)
        config.model.update(max_length=32)
        config.training.update(steps=300, eval_every=100, checkpoint_every=100)
    else:
        config.model.update(num_layers=6, d_model=256, d_ff=1024, max_length=256)
        config.data.update(
            source="tfds", tfds_name="lm1b", tokenizer="bpe", vocab_size=32000, length=256, batch_size=128
        )
        config.optimizer.update(learning_rate=1e-3, warmup_steps=4000)
        config.training.update(steps=100_000, eval_every=5000, checkpoint_every=5000, log_every=100)
    return config.lock()


def _standard(heads: int) -> dict[str, Any]:
    return {"model.num_heads": heads}


def _fixed(heads: int) -> dict[str, Any]:
    return {"model.num_heads": heads, "model.qk_dim": _SIZE, "model.v_dim": _SIZE}


def get_sweep(profile: str = "paper") -> Iterator[dict[str, Any]]:
    yield {}
    _, *others = _COUNTS[profile or "paper"]
    yield from map(_standard, others)
    yield from map(_fixed, others)


def get_paper(profile: str = "paper") -> dict[str, Any]:
    """Tables 1 and 2A beside the scaled cells; the figures on LM1B have no numbers to copy."""
    _, *others = _COUNTS[profile or "paper"]
    rows: list[dict[str, Any]] = [{"label": "base, d/h = fixed size", "cell": {}}]
    rows += [{"label": f"d/h, h={heads}", "cell": _standard(heads)} for heads in others]
    rows += [{"label": f"fixed, h={heads}", "cell": _fixed(heads)} for heads in others]
    if profile == "embedded":
        # h = 8, 16, 32 of table 1 and 8, 16, 32 of table 2A; d/h with h = 32 has no counterpart.
        printed = (90.89, 90.61, 90.45, None, 89.6, 90.43, 90.95)
        rows = [row | {"SQuAD F1": f1} for row, f1 in zip(rows, printed, strict=True)]
    return {
        "source": "Bhojanapalli et al. 2020 (arXiv:2002.07028): d/h of table 1 (d = 1024, h = 8, 16, 32), fixed of "
        "table 2A (d = 512, size 128, h = 8, 16, 32), BERT with n = 128, so the two parts are of different widths",
        "confidence": "verified",
        "rows": rows,
    }


def get_claims(profile: str = "paper") -> list[dict[str, Any]]:
    """What the paper is cited for, in the cells that the profile has."""
    *_, more, most = _COUNTS[profile or "paper"]
    first = {} if profile == "embedded" else _standard(16)
    order = [
        ("With size d/h, more heads than d/n lose.", first, _standard(more)),
        (f"With size d/h, {most} heads lose.", first, _standard(most)),
        ("With the size fixed, more heads keep helping (and parameters grow).", _fixed(most), {}),
        (f"At {most} heads the fixed size beats d/h.", _fixed(most), _standard(most)),
    ]
    if profile != "embedded":
        del order[0]
    return [
        {"text": text, "metric": "validation/loss", "better": better, "worse": worse} for text, better, worse in order
    ]
