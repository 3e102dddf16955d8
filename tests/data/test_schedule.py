import numpy as np
import pytest

from mha_jax.data.schedule import Schedule, Shuffle


def test_each_epoch_takes_every_row_once_in_another_order():
    stream = Shuffle(13, salt=0).take(seed=5, start=0, size=39).reshape(3, 13)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(13), (3, 1)))
    assert len({tuple(epoch) for epoch in stream}) == 3


def test_no_epoch_of_one_seed_repeats_an_epoch_of_another():
    epochs = [tuple(Shuffle(13, salt=0).take(seed, start, 13)) for seed in range(5) for start in range(0, 65, 13)]
    assert len(set(epochs)) == 25


def test_any_entry_can_be_asked_for_in_any_order():
    whole = Shuffle(7, salt=1).take(seed=3, start=0, size=100)
    again = Shuffle(7, salt=1)
    for start in (91, 3, 40, 0, 58):
        np.testing.assert_array_equal(again.take(3, start, 9), whole[start : start + 9])


@pytest.fixture
def schedule() -> Schedule:
    return Schedule([np.arange(0, 50), np.arange(50, 50), np.arange(50, 80), np.arange(80, 83)], [5, 7, 3, 11])


def test_buckets_are_used_as_often_as_the_batches_that_they_hold(schedule):
    used = np.bincount([schedule.at(0, step)[0] for step in range(5000)], minlength=4)
    expected = np.array([50 / 5, 0, 30 / 3, 3 / 11])
    np.testing.assert_allclose(used / 5000, expected / expected.sum(), atol=0.002)


def test_seeds_share_the_buckets_but_not_the_rows(schedule):
    for step in range(20):
        (bucket, rows), (other_bucket, other_rows) = schedule.at(0, step), schedule.at(1, step)
        assert bucket == other_bucket and len(rows) == len(other_rows)
    assert any(not np.array_equal(schedule.at(0, s)[1], schedule.at(1, s)[1]) for s in range(20))


def test_no_row_comes_again_before_every_row_of_its_bucket_came(schedule):
    seen: dict[int, list[int]] = {0: [], 2: []}
    for step in range(2500):
        bucket, rows = schedule.at(2, step)
        if bucket in seen:
            seen[bucket] += rows.tolist()
    for bucket, size in ((0, 50), (2, 30)):
        for start in range(0, len(seen[bucket]) - size, size):
            assert len(set(seen[bucket][start : start + size])) == size


def test_a_bucket_smaller_than_its_batch_fills_it_from_the_next_epochs():
    bucket, rows = Schedule([np.arange(3)], [8]).at(0, 0)
    assert bucket == 0 and len(rows) == 8 and set(rows) == {0, 1, 2}
