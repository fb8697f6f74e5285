"""What training reads: labels follow their tokens, and what is asked for stands where it is said to."""

from pathlib import Path

import numpy as np
import pytest

from distattn.data import Corpus, open_corpus
from distattn.windows import Window, recall_window, text_window


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Lines of letters, so that digits come from facts alone."""
    letters = np.random.default_rng(0).integers(97, 123, (400, 60), np.uint8)
    letters[:, -1] = ord("\n")
    for number, part in enumerate(np.array_split(letters, 3)):
        (tmp_path / f"{number}.txt").write_bytes(part.tobytes())
    return open_corpus(tmp_path)


def follows(window: Window) -> None:
    assert window.tokens.dtype == np.uint8 and window.labels.dtype == np.int64
    np.testing.assert_array_equal(window.tokens[1:], window.labels[:-1])
    assert len(window.tokens) == len(window.labels) == len(window.asked)
    assert window.weights.sum() == pytest.approx(1)


def test_text_is_the_corpus(corpus: Corpus) -> None:
    window = text_window(corpus, 100, 500)
    follows(window)
    np.testing.assert_array_equal(window.tokens, corpus.read(100, 600))
    assert window.labels[-1] == corpus.read(600, 601)[0]
    assert not window.asked.any() and not len(window.lookups)
    assert {*window.weights} == {1 / 500}


@pytest.mark.parametrize("size", [300, 1000, 8000])
def test_facts_are_asked_for_after_they_are_stated(corpus: Corpus, size: int) -> None:
    for seed in range(20):
        window = recall_window(corpus, 7, size, np.random.default_rng(seed))
        follows(window)
        assert len(window.tokens) == size
        row, found = window.lookups.T
        assert (found < row).all() and window.asked[row].all()
        np.testing.assert_array_equal(window.labels[row], window.tokens[found])
        # Half of the weight is the answers'.
        if window.asked.any():
            assert window.weights[window.asked].sum() == pytest.approx(0.5)
        # Every code that is stated is asked for, but for those whose question the window ends in.
        text = bytes(window.tokens)
        assert text.count(b"# The access code for") >= text.count(b"# What is the access code for")
    # Windows that are drawn with other numbers differ, and are the same for the same.
    one, same, other = (recall_window(corpus, 7, size, np.random.default_rng(n)) for n in (1, 1, 2))
    assert bytes(one.tokens) == bytes(same.tokens) != bytes(other.tokens)
    np.testing.assert_array_equal(one.lookups, same.lookups)


def test_a_corpus_in_memory_reads_the_same(corpus: Corpus) -> None:
    held = corpus.in_memory(len(corpus))
    assert corpus.in_memory(len(corpus) - 1) is corpus
    for part in ((0, 5), (7_990, 16_010), (0, len(corpus))):
        np.testing.assert_array_equal(held.read(*part), corpus.read(*part))
    with pytest.raises(ValueError, match="expected one inside"):
        held.read(5, len(corpus) + 1)
    held.read(0, 5)[:] = 0  # of the reader's own
    assert corpus.read(0, 5).all() and held.read(0, 5).all()
