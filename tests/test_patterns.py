"""Patterns as values: what they mean, how they combine, compare and print, and what they refuse."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_strategies import mask_of, trees

from distattn import block_patterns
from distattn import patterns as all_patterns
from distattn.patterns import (
    And,
    BlockSparse,
    Causal,
    Chunked,
    Dense,
    Dilated,
    DistanceBand,
    Documents,
    FixedStride,
    GlobalKeys,
    GlobalQueries,
    GlobalTokens,
    Not,
    Or,
    Pattern,
    PerHead,
    RandomBlocks,
    SlidingWindow,
    Strided,
)


@settings(deadline=None, max_examples=40)
@given(trees)
def test_repr_builds_an_equal_pattern(pattern: Pattern) -> None:
    again = eval(repr(pattern), vars(all_patterns).copy())
    assert again == pattern and hash(again) == hash(pattern)
    assert pickle.loads(pickle.dumps(pattern)) == pattern


def test_repr_shows_parentheses_where_needed() -> None:
    a, b, c = Causal(), Strided(2), Chunked(3)
    chunked = "Chunked(size=3, before=0, after=0)"
    assert repr(a & (b | c)) == f"Causal() & (Strided(stride=2) | {chunked})"
    assert repr(a & b | ~c) == f"Causal() & Strided(stride=2) | ~{chunked}"
    assert repr(~(a & b)) == "~(Causal() & Strided(stride=2))"
    assert repr(GlobalTokens(range(64))) == "GlobalTokens(positions=range(0, 64))"
    assert repr(GlobalKeys([9, 2, 2])) == "GlobalKeys(positions=range(2, 10, 7))"


def test_equal_values_are_equal() -> None:
    assert GlobalKeys([2, 0, 1, 1]) == GlobalKeys(range(3)) == GlobalKeys(np.array([0, 1, 2]))
    assert GlobalKeys(range(3)) != GlobalQueries(range(3))
    assert Documents(np.array([3, 4])) == Documents(iter([3, 4]))
    assert BlockSparse([0, 2], [3, 1], 4) == BlockSparse((0, 2), np.array([1, 3]), 4)
    assert SlidingWindow(np.int64(3), 0) == SlidingWindow(3, 0)
    assert isinstance(SlidingWindow(np.int64(3), 0).before, int)


@settings(deadline=None, max_examples=50)
@given(trees, st.integers(1, 40))
def test_combined_with_everything_and_nothing(pattern: Pattern, length: int) -> None:
    everything, nothing = Dense(), ~Dense()
    assert everything & pattern == pattern == pattern & everything
    assert nothing | pattern == pattern == pattern | nothing
    assert everything | pattern == everything == pattern | everything
    assert nothing & pattern == nothing == pattern & nothing
    assert ~~pattern == pattern
    assert not mask_of(nothing, length).any()


DEFINITIONS: list[tuple[Pattern, Callable[[int, int], bool]]] = [
    (Dense(), lambda q, k: True),
    (Causal(), lambda q, k: k <= q),
    (SlidingWindow(5, 2), lambda q, k: q - 5 <= k <= q + 2),
    (Dilated(7, 4, 3), lambda q, k: q - 7 <= k <= q + 4 and (q - k) % 3 == 0),
    (Strided(4), lambda q, k: (q - k) % 4 == 0),
    (FixedStride(5, 2), lambda q, k: k % 5 >= 3),
    (GlobalKeys([1, 17]), lambda q, k: k in (1, 17)),
    (GlobalQueries([1, 17]), lambda q, k: q in (1, 17)),
    (GlobalTokens([1, 17]), lambda q, k: q in (1, 17) or k in (1, 17)),
    (Chunked(7), lambda q, k: q // 7 == k // 7),
    (Chunked(7, 4, -2), lambda q, k: q // 7 - 4 <= k // 7 <= q // 7 - 2),
    (Chunked(7, 1, 2), lambda q, k: q // 7 - 1 <= k // 7 <= q // 7 + 2),
    (Documents([2, 0, 9]), lambda q, k: any(a <= q < b and a <= k < b for a, b in ((0, 2), (2, 11)))),
    (DistanceBand(-1, 4), lambda q, k: -1 <= q - k < 4),
    (BlockSparse([0, 1, 1, 3], [2, 0, 9], 4), lambda q, k: (q // 4, k // 4) in ((0, 2), (2, 0), (2, 9))),
    (Causal() & Strided(3), lambda q, k: k <= q and (q - k) % 3 == 0),
    (Causal() | Strided(3), lambda q, k: k <= q or (q - k) % 3 == 0),
    (~Causal(), lambda q, k: k > q),
]


@pytest.mark.parametrize("pattern, definition", DEFINITIONS, ids=[repr(case[0]) for case in DEFINITIONS])
def test_definitions(pattern: Pattern, definition: Callable[[int, int], bool]) -> None:
    wanted = [[definition(q, k) for k in range(40)] for q in range(40)]
    np.testing.assert_array_equal(mask_of(pattern, 40), wanted)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**70), st.none() | st.integers(1, 60))
def test_random_blocks_draws_distinct_blocks(per_row: int, block: int, seed: int, length: int | None) -> None:
    pattern = RandomBlocks(per_row, block, seed, length)
    n = 60 // block
    blocks = pattern.allows(np.arange(n)[:, None] * block, np.arange(n) * block)
    # Every position of a block stands for the block, whatever is asked for at the same time.
    at = np.arange(n * block)
    np.testing.assert_array_equal(pattern.allows(at[:, None], at), blocks[at[:, None] // block, at // block])
    choices = np.arange(n) + 1 if length is None else np.full(n, -(-length // block))
    np.testing.assert_array_equal(blocks.sum(1), np.minimum(choices, per_row))
    assert not blocks[np.arange(n) >= choices[:, None]].any()


def test_splitmix64_is_the_published_one() -> None:
    # The first two numbers of the reference implementation seeded with 0, whose state grows by the constant.
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert block_patterns._splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_random_blocks_is_uniform_and_fixed() -> None:
    rows, blocks = 20_000, 10
    pattern = RandomBlocks(2, 1, seed=5, length=blocks)
    picked = pattern.allows(np.arange(rows)[:, None], np.arange(blocks)).astype(np.float64)
    counts = picked.T @ picked
    # Each of the 45 pairs is drawn 444 times on average, with a standard deviation of 21.
    pairs = counts[np.triu_indices(blocks, 1)]
    assert pairs.sum() == rows and np.abs(pairs - rows / 45).max() < 100
    # A change of these links would change every model trained with them.
    assert [np.flatnonzero(row).tolist() for row in picked[:5]] == [[1, 9], [1, 7], [4, 5], [2, 9], [2, 3]]
    other = RandomBlocks(2, 1, seed=6, length=blocks).allows(np.arange(rows)[:, None], np.arange(blocks))
    assert (other != picked).any(1).mean() > 0.9


def test_per_head() -> None:
    heads = PerHead([Causal(), Strided(2)])
    assert heads.by_head(2) == (Causal(), Strided(2))
    assert (heads & SlidingWindow(3, 0)).by_head(2) == (
        Causal() & SlidingWindow(3, 0), Strided(2) & SlidingWindow(3, 0)
    )  # fmt: skip
    assert (SlidingWindow(3, 0) | ~heads).by_head(2) == (
        SlidingWindow(3, 0) | ~Causal(), SlidingWindow(3, 0) | ~Strided(2)
    )  # fmt: skip
    plain = Causal() & Strided(2)
    assert all(one is plain for one in plain.by_head(3)) and len(plain.by_head(3)) == 3
    assert (heads | plain).heads == 2 and plain.heads is None
    assert heads.map_leaves(lambda leaf, positive: ~leaf) == PerHead([~Causal(), ~Strided(2)])
    assert eval(repr(~heads & plain), vars(all_patterns).copy()) == ~heads & plain
    for wrong in (1, 3):
        with pytest.raises(ValueError, match=f"heads is {wrong}; expected 2"):
            (Causal() | ~heads).by_head(wrong)
    at = np.arange(4)
    for ask in (
        lambda: heads.allows(at, at),
        lambda: (Causal() & heads).spans(at, at + 1, 4),
        lambda: heads.labels(at, at, 2, 2),
    ):
        with pytest.raises(ValueError, match="by_head"):
            ask()


def test_truth_value_is_refused() -> None:
    with pytest.raises(TypeError, match="& | ~"):
        bool(Causal())
    with pytest.raises(TypeError, match="& | ~"):
        assert Causal() and Strided(2)
    with pytest.raises(TypeError):
        Causal() & True  # type: ignore[operator]
    with pytest.raises(TypeError):
        True | Causal()  # type: ignore[operator]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: SlidingWindow(-1, 0), "before is -1"),
        (lambda: SlidingWindow(0, -1), "after is -1"),
        (lambda: SlidingWindow(1.5, 0), "before is 1.5; expected an integer"),  # type: ignore[arg-type]
        (lambda: Dilated(-1, 0, 1), "before is -1"),
        (lambda: Dilated(1, -1, 1), "after is -1"),
        (lambda: Dilated(1, 1, 0), "step is 0"),
        (lambda: Strided(0), "stride is 0"),
        (lambda: FixedStride(0, 1), "stride is 0"),
        (lambda: FixedStride(4, 0), "summary is 0"),
        (lambda: FixedStride(4, 5), "summary is 5"),
        (lambda: GlobalKeys([3, -1]), "positions contains -1"),
        (lambda: GlobalTokens([0.5]), "positions is"),  # type: ignore[list-item]
        (lambda: RandomBlocks(0, 1, 1), "per_row is 0"),
        (lambda: RandomBlocks(1, 0, 1), "block is 0"),
        (lambda: RandomBlocks(1, 1, -1), "seed is -1"),
        (lambda: RandomBlocks(1, 1, 1, 0), "length is 0"),
        (lambda: Chunked(0), "size is 0"),
        (lambda: Chunked(1, -1), "before is -1"),
        (lambda: Chunked(1, 1, -2), "after is -2"),
        (lambda: Documents([3, -2]), "lengths contains -2"),
        (lambda: Documents([0.5]), "lengths is"),  # type: ignore[list-item]
        (lambda: DistanceBand(3, 3), "far is 3"),
        (lambda: BlockSparse([0, 2, 1, 3], [0, 0, 0], 4), "row_ptr is"),
        (lambda: BlockSparse([0, 1], [0, 1], 4), "row_ptr is"),
        (lambda: BlockSparse([], [], 4), "row_ptr is"),
        (lambda: BlockSparse([0, 1], [-1], 4), "col contains -1"),
        (lambda: BlockSparse([0, 1], [1], 0), "block is 0"),
        (lambda: PerHead([]), "patterns is empty"),
        (lambda: PerHead([Causal(), 3]), "patterns contains 3"),  # type: ignore[list-item]
        (lambda: PerHead([~PerHead([Causal()])]), "itself made of a PerHead"),
        (lambda: Causal().by_head(0), "heads is 0"),
        (lambda: Causal().spans([0], [0], 4), "stop is not after start"),
        (lambda: Causal().spans([0], [1, 2], 4), "expected one shape"),
        (lambda: Causal().spans([0], [1], 4, 0), "grain is 0"),
        (lambda: Causal().spans([0], [1], -1), "length is -1"),
        (lambda: Causal().picture(0), "length is 0"),
        (lambda: Causal().picture(4, 0), "size is 0"),
    ],
)
def test_bad_values_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_nodes_keep_what_they_were_built_of() -> None:
    a, b = Causal(), Strided(2)
    assert a & b == And(a, b) and a | b == Or(a, b) and ~a == Not(a)


def test_picture() -> None:
    assert Causal().picture(4, 4) == "██· · · \n████· · \n██████· \n████████"
    assert Causal().picture(8, 2) == "▒▒· \n██▒▒"
    assert Strided(8).picture(16, 2) == "░░░░\n░░░░"
    assert PerHead([Dense(), ~Dense()]).picture(2) == "head 0\n████\n████\n\nhead 1\n· · \n· · "


def test_picture_of_a_long_sequence_shows_rare_rows() -> None:
    pattern = Causal() & (SlidingWindow(10, 0) | GlobalTokens([0, 700_000]))
    lines = pattern.picture(1_000_000, 8).splitlines()
    assert len(lines) == 8 and all(len(line) == 16 for line in lines)
    assert lines[0] == "░░" + "· " * 7
    assert lines[4] == "░░" + "· " * 2 + "░░░░" + "· " * 3
    assert lines[5] == "░░" * 6 + "· " * 2
    assert lines[7] == "░░" + "· " * 4 + "░░░░░░"
