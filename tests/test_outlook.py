"""Steps that are planned ahead visit what they do when each is planned alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_strategies import trees

from distattn import presets
from distattn.cached_levels import LevelPlan, Sizes
from distattn.outlook import Outlook, Seen
from distattn.patterns import Pattern
from distattn.spec import AttentionSpec

SIZES = Sizes(2, 1, 8, 8, 96, 1, 4, torch.float32, torch.device("cpu"))


def same(one: Seen, other: Seen) -> None:
    for some, others in zip(one, other, strict=True):
        for a, b in zip(some, others, strict=True):
            for x, y in zip((*a.full, a.row, a.page), (*b.full, b.row, b.page), strict=True):
                assert np.array_equal(x, y)
            assert torch.equal(a.masks.allows[a.mask], b.masks.allows[b.mask])


def check(outlook: Outlook, alone: Outlook, start: list[int], count: list[int]) -> None:
    """One step, with an outlook that may have planned it, and with one that plans it now."""
    at = np.asarray(start), np.asarray(count)
    tiles = outlook.tiles(*at)
    same(outlook.seen(*at, tiles), alone.seen(*at, tiles))


@given(
    pattern=trees,
    block=st.sampled_from([1, 4, 8]),
    starts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 16), min_size=3, max_size=3),
    whole=st.booleans(),
    steps=st.integers(1, 5),
)
def test_steps_that_go_on_alike(
    pattern: Pattern, block: int, starts: list[int], sizes: list[int], whole: bool, steps: int
) -> None:
    spec = AttentionSpec(pattern)
    count = [-(-size // block) * block if whole else size for size in sizes[: len(starts)]]
    outlook = Outlook(spec, None, (block, 1), SIZES, False)
    for step in range(steps):
        start = [first + step * size for first, size in zip(starts, count, strict=True)]
        if max(a + b for a, b in zip(start, count, strict=True)) <= SIZES.max_len:
            check(outlook, Outlook(spec, None, (block, 1), SIZES, False), start, count)
    check(outlook, Outlook(spec, None, (block, 1), SIZES, False), starts, count)  # and from the beginning again


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", ["two levels", "gates", "chosen"])
def test_levels(name: str, few: bool) -> None:
    spec = {
        "two levels": presets.combiner(8, (4, 8), (2,)),
        "gates": presets.nsa(8, 4, 8, 4, 10),
        "chosen": presets.hierarchical(8, (4, 8), (2,), 3, "tile"),
    }[name]
    plan = LevelPlan(spec, SIZES)
    outlook, size = Outlook(spec, plan, plan.tile(few, 8), SIZES, True), 1 if few else 16
    for start in [*range(0, 5 * size, size), 3 * size, 64, 0]:
        check(outlook, Outlook(spec, plan, plan.tile(few, 8), SIZES, True), [start], [size])


def test_several_steps_are_planned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    plan = Outlook._plan

    def counted(self: Outlook, tiles: object, length: int) -> Seen:
        planned.append(length)
        return plan(self, tiles, length)  # type: ignore[arg-type]

    monkeypatch.setattr(Outlook, "_plan", counted)
    outlook = Outlook(presets.mistral(10), None, (1, 1), SIZES, False)
    for round_ in range(2):
        for start in range(20):
            check(outlook, outlook, [start], [1])
        assert planned == [1, 3, 7, 15, 31], round_
    check(outlook, outlook, [95], [1])
    check(outlook, outlook, [93], [1])
    check(outlook, outlook, [94], [1])
    assert planned[5:] == [96, 94, 96]
    check(outlook, outlook, [5, 80], [1, 1])
    check(outlook, outlook, [6, 81], [1, 1])
    assert planned[8:] == [81, 83]
