"""Training batches whose sequences are all of one source."""

import itertools

import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.data.batches import Dataset, Datasets, Reading, train_iterator


class Numbers(Dataset):
    def sequence(self, index):
        return {"number": np.int32(index)}


def read(num, one_source=True, **options):
    data = Datasets(
        config=Reading(one_source=one_source, threads=0),
        train=[Numbers(10, 0), Numbers(7, 1)],
        eval=[],
        weights=(1.0, 3.0),
        domains=("a", "b"),
        manifest={},
    )
    batches = train_iterator(data, **{"batch_size": 4, "seed": 0} | options)
    return list(itertools.islice(batches, num))


def test_every_batch_is_of_one_source_and_shares_are_the_weights():
    batches = read(40)
    sources = [set(batch["domain"].tolist()) for batch in batches]
    assert all(len(own) == 1 for own in sources)
    assert sum(own == {1} for own in sources) == 30
    assert any(len(set(b["domain"].tolist())) == 2 for b in read(4, one_source=False))
    # Every sequence of a source comes once before any comes again.
    second = np.concatenate([b["example_id"] for b in batches if b["domain"][0] == 1])
    assert len(set(second[:7].tolist())) == len(set(second[7:14].tolist())) == 7


def test_a_run_goes_on_where_it_stopped_and_processes_read_their_rows():
    whole = read(6)
    for ours, theirs in zip(whole[2:], read(4, start=8), strict=True):
        np.testing.assert_array_equal(ours["example_id"], theirs["example_id"])
    for ours, part in zip(whole, read(6, rows=(1, 3)), strict=True):
        np.testing.assert_array_equal(ours["example_id"][[1, 3]], part["example_id"])


def test_a_start_inside_of_a_batch_is_refused():
    with pytest.raises(ConfigError, match="start = 6: must be a multiple of"):
        read(1, start=6)
