"""The next batch is made in a thread, and is the one that would have been made without it."""

import threading

import numpy as np
import pytest
import torch

from aam.data.dataset import SampleDataset
from aam.data.table import read_table
from aam.learning.prefetch import Prefetch


@pytest.fixture
def dataset(community):
    dataset = SampleDataset(read_table(community.table), token_limit=4, asv_sampling="random")
    dataset.made = []
    make = dataset.batch

    def noted(rows, **more):
        dataset.made.append(threading.current_thread() is threading.main_thread())
        return make(rows, **more)

    dataset.batch = noted
    return dataset


def ids(batch):
    return batch.asv_ids.tolist()


def test_a_batch_is_a_function_of_rows_and_seed_whoever_makes_it(dataset):
    prefetch, rows, others = Prefetch(dataset, torch.device("cpu")), np.arange(6), np.arange(6, 12)
    alone = ids(prefetch.take(rows, 3))
    assert dataset.made == [True]
    torch.manual_seed(99)  # what else draws does not matter
    prefetch.begin(rows, 3)
    prefetch.begin(others, 4)
    prefetch.begin(rows, 3)
    assert ids(prefetch.take(rows, 3)) == ids(prefetch.take(rows, 3)) == alone
    later = ids(prefetch.take(others, 4))
    assert dataset.made == [True, False, False], "begun once, and in a thread"
    assert ids(prefetch.take(rows, 4)) != later, "the plan has changed"
    assert ids(prefetch.take(rows, 5)) != alone
    prefetch.close()


def test_an_error_of_the_thread_is_raised_where_the_batch_is_taken(dataset):
    prefetch = Prefetch(dataset, torch.device("cpu"))
    prefetch.begin(np.array([10_000]), 0)
    with pytest.raises(IndexError):
        prefetch.take(np.array([10_000]), 0)
