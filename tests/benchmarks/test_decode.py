"""The decode benchmark steps a model over a full cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.benchmarks import decode
from mha_jax.models.cache import cached_step
from mha_jax.specs import UserError

TINY = decode.Setting(heads=(4,), num_kv_heads=(2,), lengths=(7,), batch_size=4, d_model=12, d_ff=13)


def test_groups_that_do_not_divide_the_heads_are_left_out():
    assert decode.Setting(heads=(8, 32), num_kv_heads=(1, 8, 16)).shapes == [(8, 1), (8, 8), (32, 1), (32, 8), (32, 16)]
    with pytest.raises(UserError, match="nothing that divides"):
        decode.Setting(heads=(4,), num_kv_heads=(3,), d_model=12)


@pytest.mark.slow
def test_a_timed_call_is_a_cached_step_at_the_last_position_and_goes_on_from_its_own_output():
    model = decode.decoder(TINY, 4, 2, 7, "float32")
    cache = decode.random_cache(model.decoder, 4, 7)
    token = jax.random.normal(jax.random.key(2), (4, 1, 12))
    call = decode.step_call(model, 7, token, cache, jax.devices()[:2])
    call()
    token_now, _ = call()
    first, filled = cached_step(model.decoder, token, jnp.array(6), cache)
    second, _ = cached_step(model.decoder, first, jnp.array(6), filled)
    np.testing.assert_allclose(token_now, second, atol=1e-5)
    assert not token.is_deleted() and not jax.tree.leaves(cache)[0].is_deleted()


def test_bytes_of_the_cache_are_those_of_its_groups(monkeypatch):
    monkeypatch.setattr("mha_jax.benchmarks.environment.torch_device", lambda: None)
    monkeypatch.setattr(decode, "step_call", lambda *_: None)
    monkeypatch.setattr(decode, "read_call", lambda *_: None)
    monkeypatch.setattr(decode, "race", lambda calls, _: {key: [2e-3, 4e-3, 3e-3] for key in calls})
    (row,) = decode.measure(TINY)["rows"]
    assert row["cache_bytes"] == 4 * 2 * 7 * (3 + 3) * 4  # rows, groups, positions, widths of key and value, bytes
    assert row["gbytes_per_second"][decode.OURS] == pytest.approx(row["cache_bytes"] / 3e-3 / 1e9)
    assert row["ratio"][decode.FLOOR]["median"] == 1.0


def test_reading_the_cache_reads_all_of_it():
    cache = decode.random_cache(decode.decoder(TINY, 4, 2, 7, "float32").decoder, 4, 7)
    sums, _ = decode.read_call(cache, jax.devices()[:2])()
    for total, leaf in zip(sums, jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(total, np.sum(leaf, axis=(1, 2, 3)), rtol=1e-4)
