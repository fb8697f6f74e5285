"""Accounting of a cache's pages against a model: every slot has a content, every sequence a list of them."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distattn.errors import CacheFull, ConfigError
from distattn.pages import PageTables

RANKS, BLOCKS, ROWS = 3, 5, 4


class Machine(RuleBasedStateMachine):
    """slots: what each row of each rank holds. wanted: by sequence, what each position should hold; None: evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = PageTables(RANKS, BLOCKS, ROWS)
        self.slots: dict[tuple[int, int], int] = {}
        self.wanted: dict[int, list[int | None]] = {}
        self.made = 0

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.wanted)))

    @rule()
    def add(self) -> None:
        number = self.tables.add()
        assert number not in self.wanted
        self.wanted[number] = []

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        old = self.pick(data)
        self.wanted[self.tables.fork(old)] = list(self.wanted[old])

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        old = self.pick(data)
        self.tables.free(old)
        del self.wanted[old]
        with pytest.raises(ConfigError, match="sequence is"):
            self.tables.free(old)

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        number = self.pick(data)
        content = self.wanted[number]
        pages = data.draw(st.sets(st.integers(0, max(len(content) // ROWS, 1) - 1)))
        held = {p for p in range(len(content) // ROWS) if content[p * ROWS] is not None}
        if not pages <= held:
            with pytest.raises(ConfigError, match="pages are"):
                self.tables.evict(number, pages)
            return
        self.tables.evict(number, pages)
        for page in pages:
            content[page * ROWS : (page + 1) * ROWS] = [None] * ROWS

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        counts = data.draw(st.dictionaries(st.sampled_from(sorted(self.wanted)), st.integers(0, 9), min_size=1))
        before = self.tables.references.copy()
        try:
            written = self.tables.append(counts)
        except CacheFull:
            assert (self.tables.references == before).all()
            # Of new blocks alone, there would be too many; or some rank is full.
            free = [self.tables.free_blocks(rank) for rank in range(RANKS)]
            pages = sum(
                -(-(len(self.wanted[s]) + n) // ROWS) - -(-len(self.wanted[s]) // ROWS) for s, n in counts.items()
            )
            # (A block that sequences share is copied where it is, once for each that writes.)
            assert pages + len(counts) > sum(free) or min(free) < len(counts)
            return
        for rank, old, new in written.copies:
            for row in range(ROWS):
                if (rank, old * ROWS + row) in self.slots:
                    self.slots[rank, new * ROWS + row] = self.slots[rank, old * ROWS + row]
        places = zip(written.owner.tolist(), written.slot.tolist(), strict=True)
        for number, count in counts.items():
            for _ in range(count):
                self.made += 1
                self.slots[next(places)] = self.made
                self.wanted[number].append(self.made)
        assert next(places, None) is None

    @invariant()
    def contents(self) -> None:
        readers = np.zeros((RANKS, BLOCKS), int)
        for number, content in self.wanted.items():
            owner, block = self.tables.pages(number)
            assert self.tables.length(number) == len(content)
            assert len(owner) == len(block) == -(-len(content) // ROWS)
            for page, (rank, at) in enumerate(zip(owner.tolist(), block.tolist(), strict=True)):
                part = content[page * ROWS : (page + 1) * ROWS]
                if rank < 0:
                    assert part == [None] * ROWS
                    continue
                readers[rank, at] += 1
                assert part == [self.slots[rank, at * ROWS + row] for row in range(len(part))]
        assert (self.tables.references == readers).all()
        assert [self.tables.free_blocks(rank) for rank in range(RANKS)] == (readers == 0).sum(1).tolist()


TestPages = Machine.TestCase
TestPages.settings = settings(max_examples=min(settings().max_examples, 100))  # each has up to 50 steps


def test_new_blocks_go_to_the_rank_with_the_fewest() -> None:
    tables = PageTables(3, 4, 2)
    first, second = tables.add(), tables.add()
    assert tables.append({first: 8}).owner.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert tables.append({second: 3}).owner.tolist() == [1, 1, 2]
    tables.free(first)
    assert sorted(set(tables.append({second: 5}).owner.tolist())) == [0, 2]


def test_new_blocks_are_the_lowest_and_follow_one_another() -> None:
    tables = PageTables(1, 8, 2)
    first, second = tables.add(), tables.add()
    assert tables.append({first: 6}).slot.tolist() == list(range(6))
    tables.append({second: 4})
    tables.free(first)
    assert tables.append({second: 8}).slot.tolist() == [0, 1, 2, 3, 4, 5, 10, 11]


def test_a_full_cache_says_what_it_has() -> None:
    tables = PageTables(2, 2, 4)
    one = tables.add()
    tables.append({one: 13})
    tables.append({one: 3})
    with pytest.raises(CacheFull, match=r"no room for 1 tokens of 1 sequences: 1 blocks of 4 .* \[0, 0\] are free"):
        tables.append({one: 1})
    with pytest.raises(ConfigError, match="counts has -1"):
        tables.append({one: -1})
    with pytest.raises(ConfigError, match="blocks is 0"):
        PageTables(1, 0, 4)
