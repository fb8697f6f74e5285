"""Masks as intervals and as bits: the same masks, whatever is asked of them."""

import numpy as np
import pytest
import torch

from distattn.kernels.masks import Masks


def pair_of(columns: int) -> tuple[Masks, Masks]:
    """Nine masks of seven rows, some of them alike and some rows empty, as intervals and as bits."""
    ends = np.sort(np.random.default_rng(columns).integers(0, columns + 1, (6, 2, 7)), axis=1).astype(np.int16)
    ends[:, :, 3] = 0
    ends[0] = [[0], [columns]]
    ends[1] = 0
    intervals = Masks(columns, np.concatenate((ends * (ends[:, :1] < ends[:, 1:]), ends[:1], ends[2:4])))
    return intervals, Masks(columns, intervals.words(torch.device("cpu")).numpy().view(np.uint32))


@pytest.mark.parametrize("columns", [1, 16, 20, 32, 33, 128, 200])
def test_intervals_and_bits_are_the_same_masks(columns: int) -> None:
    intervals, bits = pair_of(columns)
    assert intervals.are_intervals and not bits.are_intervals
    at = torch.arange(columns)
    for n, (start, stop) in enumerate(intervals.data):
        for row in range(7):
            expected = (at >= int(start[row])) & (at < int(stop[row]))
            assert torch.equal(intervals.allows[n, row], expected) and torch.equal(bits.allows[n, row], expected)
            assert intervals.allowed[n, row] == bits.allowed[n, row] == expected.sum()
    for masks in (intervals, bits):
        assert masks.nothing().tolist() == [not x.any() for x in masks.allows]
        assert masks.everything().tolist() == [bool(x.all()) for x in masks.allows]
    both = Masks.joined([intervals, bits])
    assert not both.are_intervals and torch.equal(both.allows, torch.cat((intervals.allows, bits.allows)))


@pytest.mark.parametrize("form", [0, 1])
def test_masks_are_kept_once(form: int) -> None:
    masks = pair_of(40)[form]
    once, kind = masks.distinct()
    assert len(once) == 6 and torch.equal(once.allows[kind], masks.allows)
    named, mask = once.named(np.array([5, 2, 5]))
    assert len(named) == 2 and torch.equal(named.allows[mask], once.allows[[5, 2, 5]])


def test_no_masks() -> None:
    intervals, bits = pair_of(16)
    none = intervals[np.zeros(0, np.int64)]
    assert [len(x) for x in none.distinct()] == [0, 0] and len(none.named(np.zeros(0, np.int64))[0]) == 0
    assert len(Masks.joined([none, none])) == 0 and len(Masks.joined([none, bits])) == len(bits)
