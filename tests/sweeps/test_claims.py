"""A claim or a table that makes no sense is refused where the config file is read."""

import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import claims

ONE, EIGHT = {"model.num_heads": 1}, {"model.num_heads": 8}


@pytest.mark.parametrize(
    "claim",
    [
        {"metric": "validation/loss", "better": EIGHT},
        {"metric": "validation/loss", "better": EIGHT, "worse": "one"},
        {"metric": "validation/loss", "better": EIGHT, "worse": ONE, "margn": 0.1},
        {"metric": "validation/loss", "between": [EIGHT], "margin": 0.1},
        {"metric": "validation/loss", "between": [EIGHT, ONE], "margin": 0},
        {"metric": "validation/charm", "better": EIGHT, "worse": ONE},
    ],
)
def test_a_claim_that_makes_no_sense_is_refused(claim):
    with pytest.raises(UserError, match=r"^(claim|metric) "):
        claims.parse({"text": "…", **claim})
