import pytest

from mha_jax.reporting import claims, results
from mha_jax.sweeps.claims import parse

ONE, EIGHT = {"model.num_heads": 1}, {"model.num_heads": 8}
DEFAULT, VASWANI = "configs/default.py", "configs/vaswani2017_table3.py:paper"


def check(sweep, **claim):
    (verdict,) = claims.check([parse({"text": "…", **claim})], results.read(sweep.path))
    return verdict


@pytest.mark.parametrize(
    ("one", "status"),
    [
        ([1.55, 1.56, 1.545], "held"),  # 8 heads better by about 0.05, every seed alike
        ([1.45, 1.46, 1.445], "not held"),
        ([1.55, 1.42, 1.54], "undecided"),  # the sign differs from seed to seed
    ],
)
def test_the_interval_decides(make_sweep, one: list[float], status: str):
    sweep = make_sweep(DEFAULT, {0: one, 3: [1.5, 1.51, 1.49]})
    assert check(sweep, metric="validation/loss", better=EIGHT, worse=ONE).status == status


def test_pairing_by_seed_sees_what_the_spread_between_seeds_hides(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.02, 2.021, 3.019], 3: [1.0, 2.0, 3.0]})
    verdict = check(sweep, metric="validation/loss", better=EIGHT, worse=ONE)
    assert verdict.status == "held"
    assert verdict.difference is not None and verdict.difference.mean == pytest.approx(0.02)


def test_a_margin_that_the_interval_straddles_is_undecided(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.55, 1.56, 1.545], 3: [1.5, 1.51, 1.49]})
    claim = {"metric": "validation/loss", "better": EIGHT, "worse": ONE}
    assert check(sweep, **claim, margin=0.02).status == "held"
    assert check(sweep, **claim, margin=0.051).status == "undecided"
    assert check(sweep, **claim, margin=0.2).status == "not held"


def test_higher_bleu_is_better(make_sweep):
    sweep = make_sweep(VASWANI, {0: [1.5, 1.51, 1.49], 1: [1.55, 1.56, 1.545]}, bleu=True)
    assert check(sweep, metric="validation/bleu", better={}, worse=ONE).status == "held"
    assert check(sweep, metric="validation/bleu", better=ONE, worse={}).status == "not held"


@pytest.mark.parametrize(("margin", "status"), [(0.1, "held"), (0.055, "undecided"), (0.001, "not held")])
def test_likeness_needs_the_whole_interval_within_the_margin(make_sweep, margin: float, status: str):
    sweep = make_sweep(DEFAULT, {0: [1.55, 1.56, 1.545], 3: [1.5, 1.51, 1.49]})
    assert check(sweep, metric="validation/loss", between=[EIGHT, ONE], margin=margin).status == status


def test_what_cannot_be_decided_says_why(make_sweep):
    sweep = make_sweep(DEFAULT, {3: [1.5, 1.51, 1.49]})
    claim = {"metric": "validation/loss", "better": EIGHT}
    assert "queued" in check(sweep, **claim, worse=ONE).sentence
    assert "not a cell" in check(sweep, **claim, worse={"model.num_heads": 3}).sentence
    sweep.runs[0].update(state="failed", error="out of memory")
    verdict = check(sweep, **claim, worse=ONE)
    assert verdict.status == "undecided" and "out of memory" in verdict.sentence


def test_one_seed_decides_nothing(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.6, float("nan"), float("nan")], 3: [1.5, 1.5, 1.5]})
    verdict = check(sweep, metric="validation/loss", better=EIGHT, worse=ONE)
    assert verdict.status == "undecided" and "1 common seed:" in verdict.sentence
