import random

import numpy as np
import pytest
import torch

from wsss.data.samplers import (
    SizeBuckets,
    TrainSampler,
    UnpaddedDistributedSampler,
    seed_worker,
)


def train_order(replicas: int, *, epoch: int = 0) -> list[set[int]]:
    """Images of each optimiser step, over all processes."""
    shares = []
    for rank in range(replicas):
        sampler = TrainSampler(
            length=50,
            global_batch_size=12,
            per_device=12 // replicas,
            num_replicas=replicas,
            rank=rank,
            seed=1,
        )
        sampler.set_epoch(epoch)
        items = list(sampler)
        assert len(items) == len(sampler) == 48 // replicas
        assert {e for e, _ in items} == {epoch}
        shares.append([index for _, index in items])
    size = 12 // replicas
    return [
        {index for share in shares for index in share[step * size : (step + 1) * size]}
        for step in range(4)
    ]


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_steps_hold_the_same_images_for_any_number_of_processes(replicas: int) -> None:
    assert train_order(replicas, epoch=2) == train_order(1, epoch=2)


def test_two_processes_share_a_step_as_two_passes_of_one_do() -> None:
    def share(replicas: int, rank: int) -> list[tuple[int, int]]:
        return list(
            TrainSampler(
                length=50,
                global_batch_size=12,
                per_device=6,
                num_replicas=replicas,
                rank=rank,
                seed=1,
            )
        )

    alone = share(1, 0)  # accumulates two passes of six
    passes = [alone[start : start + 6] for start in range(0, 48, 6)]
    for rank in (0, 1):
        assert share(2, rank) == [pair for one in passes[rank::2] for pair in one]


def test_an_epoch_repeats_no_image_and_epochs_differ() -> None:
    first, second = train_order(1), train_order(1, epoch=1)
    assert sum(map(len, first)) == len(set().union(*first)) == 48
    assert first != second


def test_start_skips_only_in_its_own_epoch() -> None:
    def sampler(**changes: tuple[int, int]) -> TrainSampler:
        return TrainSampler(
            length=50,
            global_batch_size=10,
            per_device=10,
            num_replicas=1,
            rank=0,
            seed=1,
            **changes,
        )

    whole, resumed = sampler(), sampler(start=(3, 20))
    whole.set_epoch(3)
    # before Lightning calls set_epoch the resumed sampler is in the right epoch already
    assert list(resumed) == list(whole)[20:]
    assert len(resumed) == 50
    for each in (whole, resumed):
        each.set_epoch(4)
    assert list(resumed) == list(whole)


@pytest.mark.parametrize(("length", "replicas"), [(10, 3), (2, 4), (7, 1)])
def test_evaluation_counts_each_image_once(length: int, replicas: int) -> None:
    shares = [
        list(UnpaddedDistributedSampler(length=length, num_replicas=replicas, rank=rank))
        for rank in range(replicas)
    ]
    assert sorted(index for share in shares for index in share) == list(range(length))
    assert [len(share) for share in shares] == [
        len(UnpaddedDistributedSampler(length=length, num_replicas=replicas, rank=rank))
        for rank in range(replicas)
    ]


@pytest.mark.parametrize("replicas", [1, 3])
def test_buckets_hold_equal_sizes_and_every_image_once(replicas: int) -> None:
    sizes = [(30, 40 + index % 3) for index in range(23)]
    seen = []
    for rank in range(replicas):
        share = UnpaddedDistributedSampler(length=23, num_replicas=replicas, rank=rank)
        buckets = SizeBuckets(share, sizes=sizes, batch_size=4)
        batches = list(buckets)
        assert len(batches) == len(buckets)
        assert list(buckets) == batches  # a second pass is the same
        assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
        assert max(map(len, batches)) <= 4
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(23))


def drawn(seed: int, rank: int, worker: int) -> tuple[float, float, float]:
    seed_worker(seed, rank, worker)
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_workers_have_streams_of_their_own_in_every_library() -> None:
    identities = [(s, r, w) for s in (0, 1) for r in (0, 1) for w in (0, 1)]
    first = [drawn(*identity) for identity in identities]
    for library in zip(*first, strict=True):
        assert len(set(library)) == len(identities)
    assert [drawn(*identity) for identity in identities] == first
