"""Layouts: every token once, equal shares, balanced work."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.errors import ConfigError
from distattn.layout import LAYOUTS, TOLERANCE, imbalance, make_layout

sizes = st.tuples(st.integers(1, 5000), st.integers(1, 9), st.sampled_from([1, 8, 16]))


@given(st.sampled_from(LAYOUTS), sizes, st.integers(0, 3))
def test_every_token_has_one_owner_and_shares_are_equal(name: str, size: tuple[int, int, int], seed: int) -> None:
    length, world_size, unit = size
    work = np.random.default_rng(seed).integers(0, 100, -(-length // unit))
    layout = make_layout(name, length, world_size, unit, work)
    assert layout.start[0] == 0 and layout.stop[-1] == length
    np.testing.assert_array_equal(layout.start[1:], layout.stop[:-1])
    assert (layout.start % unit == 0).all() and (layout.owner[1:] != layout.owner[:-1]).all()
    tokens = layout.tokens()
    assert tokens.sum() == length
    # The end of the sequence may cut a unit short.
    assert tokens.max() - tokens.min() < 2 * unit
    np.testing.assert_array_equal(
        np.repeat(layout.owner, layout.stop - layout.start), layout.owner_of(np.arange(length))
    )
    for rank in range(world_size):
        assert sum(stop - start for start, stop in layout.segments(rank)) == tokens[rank]


def test_the_usual_layouts_look_as_documented() -> None:
    drawn = {name: "".join(map(str, make_layout(name, 16, 4, 1).owners(1))) for name in LAYOUTS[:3]}
    assert drawn == {"contiguous": "0000111122223333", "zigzag": "0011223333221100", "striped": "0123012301230123"}


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_balanced_work_is_within_five_percent(world_size: int) -> None:
    causal = np.arange(1, 1025)
    layout = make_layout("balanced", 1024 * 16, world_size, 16, causal)
    assert imbalance(causal, layout.owners(16), world_size) <= TOLERANCE


def test_balanced_keeps_even_work_in_one_piece() -> None:
    layout = make_layout("balanced", 4096, 4, 16, np.full(256, 7))
    assert [len(layout.segments(r)) for r in range(4)] == [1, 1, 1, 1]


@given(st.sampled_from(LAYOUTS), sizes, st.integers(1, 4))
def test_shards_are_divided_and_joined(name: str, size: tuple[int, int, int], parts: int) -> None:
    length, world_size, unit = size
    whole = make_layout(name, length, world_size, unit, np.ones(-(-length // unit), np.int64))
    layout = whole.divided(parts)
    assert layout.world_size == world_size * parts and layout.tokens().sum() == length
    for rank in range(world_size):
        mine = [rank * parts + part for part in range(parts)]
        runs = [np.arange(*segment) for r in mine for segment in layout.segments(r)]
        rows = [np.arange(*segment) for segment in whole.segments(rank)]
        # In the order of the ranks they make up the shard.
        assert np.array_equal(np.concatenate([*runs, []]), np.concatenate([*rows, []]))
        tokens = layout.tokens()[mine]
        assert tokens.max() - tokens.min() < 2 * unit
    joined = layout.joined(parts)
    assert joined.owner.tolist() == whole.owner.tolist() and joined.start.tolist() == whole.start.tolist()


def test_only_divided_layouts_are_joined() -> None:
    zigzag = make_layout("zigzag", 16, 2, 1)
    assert "".join(map(str, zigzag.divided(2).owners(1))) == "0000222233331111"
    with pytest.raises(ConfigError, match="layout is 'zigzag' for 4 ranks.*among 2 each"):
        make_layout("zigzag", 16, 4, 1).joined(2)
    with pytest.raises(ConfigError, match="for 2 ranks.*among 3"):
        zigzag.joined(3)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="ring.*expected|one of contiguous.*'ring'"):
        make_layout("ring", 100, 2, 1)
    with pytest.raises(ConfigError, match="needs the work"):
        make_layout("balanced", 100, 2, 1)
