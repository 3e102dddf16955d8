"""Jin et al. 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention", table 3: language models from scratch.

Question:    does a token need all heads, when a router chooses for it?
Scientific:  model.routing: none, or so that a token uses 75 % or 50 % of the heads (a quarter or a third of those
             shared: by table 6 it hardly matters), and against it a plain model with half the heads, as wide each.
Nuisance:    the seed: three a cell, compared seed by seed (the paper ran each cell once).
Fixed:       everything else; the router adds d_model * (heads + 2) parameters to an attention.
Decides:     validation/loss in nats; the paper has the mean accuracy of six zero-shot tasks. Also told:
             validation/active_heads/NAME and busiest_head/NAME, the share of tokens that use the head most used.

  --config=configs/jin2024_moh.py:paper     12 layers, d_model 768, 12 heads on C4, 100 billion tokens. The numbers we
                                            hold do not name the paper's shape, corpus and optimizer: a common shape
                                            of the size of its small model stands in.
  --config=configs/jin2024_moh.py:embedded  2 layers, d_model 128, 8 heads on the embedded corpus: parity within noise
                                            is all that so small a model can show. About 12 minutes on two CPU cores.

Routing saves no time in training or evaluation here: all heads are computed and gated. status.json has flops_per_token,
which are computed, beside active_flops_per_token, which would be if idle heads were skipped; keys and values stay.
`python -m experiments.bench routing` times a way that skips them, which on CPU is no quicker.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import default
from mha_jax.specs import UserError


def get_config(profile: str = "paper") -> ConfigDict:
    if profile not in ("", "paper", "embedded"):
        raise UserError(f"unknown profile {profile!r} of configs/jin2024_moh.py; known are 'paper' and 'embedded'")
    config = default.get_config().unlock()
    config.name = f"jin2024-{profile or 'paper'}"
    config.training.update(steps=300, eval_every=100, checkpoint_every=100)
    if profile != "embedded":
        config.model.update(
            num_layers=12, d_model=768, num_heads=12, d_ff=3072, max_length=1024, positions="rope", dtype="bfloat16"
        )
        config.data.update(
            source="tfds", tfds_name="c4/en", tokenizer="bpe", vocab_size=32000, length=1024, batch_size=512
        )
        config.optimizer.update(learning_rate=6e-4, warmup_steps=2000, weight_decay=0.1, beta2=0.95, clip_norm=1.0)
        config.training.update(steps=190_000, eval_every=5000, checkpoint_every=5000, log_every=100)
    return config.lock()


_SHARED_AND_CHOSEN = {"paper": {75: (3, 6), 50: (2, 4)}, "embedded": {75: (2, 4), 50: (1, 3)}}


def _routed(profile: str, percent: int) -> dict[str, Any]:
    shared, top_k = _SHARED_AND_CHOSEN[profile or "paper"][percent]
    return {"model.routing.kind": "moh", "model.routing.shared": shared, "model.routing.top_k": top_k}


def _fewer(profile: str) -> dict[str, Any]:
    """A plain model with half the heads, each as wide as before."""
    model = get_config(profile).model
    width = model.d_model // model.num_heads
    return {"model.num_heads": model.num_heads // 2, "model.qk_dim": width, "model.v_dim": width}


def get_sweep(profile: str = "paper") -> Iterator[dict[str, Any]]:
    yield {}
    yield _routed(profile, 75)
    yield _routed(profile, 50)
    yield _fewer(profile)


def get_paper(profile: str = "paper") -> dict[str, Any]:
    """Table 3, the small model at 100 billion tokens."""
    names = ("label", "cell", "zero-shot accuracy")
    rows = [
        ("all heads", {}, 43.9),
        ("75 % of heads", _routed(profile, 75), 44.6),
        ("50 % of heads", _routed(profile, 50), 45.4),
        ("half the heads, plain", _fewer(profile), None),
    ]
    return {
        "source": "Jin et al. 2024, table 3 (arXiv:2410.11842): LLM-S, 100B tokens, mean of six tasks, one run a cell",
        "confidence": "verified",
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
    }


def get_claims(profile: str = "paper") -> list[dict[str, Any]]:
    """What the table is cited for; a margin below 0 is how much worse is still as good."""
    metric, routed = "validation/loss", {percent: _routed(profile, percent) for percent in (75, 50)}
    return [
        {
            "text": "75 % of the heads a token are as good as all, to within 0.02 nats, or better.",
            "metric": metric,
            "better": routed[75],
            "worse": {},
            "margin": -0.02,
        },
        {
            "text": "50 % of the heads a token are as good as all, to within 0.02 nats, or better.",
            "metric": metric,
            "better": routed[50],
            "worse": {},
            "margin": -0.02,
        },
        {
            "text": "Half of the heads chosen by the token beat half as many heads without a router.",
            "metric": metric,
            "better": routed[50],
            "worse": _fewer(profile),
        },
    ]
