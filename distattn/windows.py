"""What a training step reads: windows of a text, as they are or with facts planted in them that are asked for later."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from distattn import tasks
from distattn.data import Corpus

CURRICULA = ("text", "recall")
# Of facts in `recall`: how often each kind, and one for so many bytes of a window, on average.
SHARES: tuple[tuple[Callable[[Generator], tasks.Fact], float], ...] = (
    (tasks.access_code, 0.7),
    (tasks.access_codes, 0.06),
    (tasks.variables, 0.06),
    (tasks.line_of_letters, 0.06),
    (tasks.assignment, 0.12),
)
BYTES_PER_FACT = 400


class Window(NamedTuple):
    """One sequence, whole; made alike on every rank.

    tokens: uint8 [n]. labels: int64 [n], the byte that follows each. asked: bool [n], whether the label is part of an
    answer. lookups: int64 [m, 2]: a row that foretells a byte of an answer, and the position of that byte in the text
    before it.
    """

    tokens: NDArray[np.uint8]
    labels: NDArray[np.int64]
    asked: NDArray[np.bool_]
    lookups: NDArray[np.int64]

    @property
    def weights(self) -> NDArray[np.float64]:
        """Of the labels' losses, float64 [n], with the sum 1: half for answers, where there are any, half for text."""
        asked = int(self.asked.sum())
        text = len(self.asked) - asked
        if not asked or not text:
            return np.full(len(self.asked), 1 / len(self.asked))
        return np.where(self.asked, 0.5 / asked, 0.5 / text)


def text_window(corpus: Corpus, first: int, size: int) -> Window:
    """The bytes [first, first + size) of a corpus, and the byte after them as the last label.

    Raises:
        ValueError, ConfigError: as `Corpus.read`.
    """
    return _window(corpus.read(first, first + size + 1), [], [])


def recall_window(corpus: Corpus, first: int, size: int, rng: Generator) -> Window:
    """A text with facts planted in it, each asked for and answered after its last statement, anywhere.

    Args:
        corpus, first: where the text begins; of its bytes as many are read as the facts leave room for.
        size: tokens of the window.
        rng: everything is drawn from it.

    Raises:
        ValueError, ConfigError: as `Corpus.read`.
    """
    kinds, shares = zip(*SHARES, strict=True)
    facts, room = [], size + 1
    for _ in range(max(1, rng.poisson(size / BYTES_PER_FACT))):
        fact = kinds[rng.choice(len(kinds), p=shares)](rng)
        used = sum(map(len, (*fact.statements, fact.question, fact.answer))) + 2
        if used > room:
            break
        facts.append(fact)
        room -= used
    text = corpus.read(first, first + room)
    lines: list[tuple[float, int, int, bytes]] = []  # depth, fact, statement or -1 for the question, text
    for number, fact in enumerate(facts):
        depths = np.sort(rng.random(len(fact.statements) + 1)).tolist()
        lines += [(depths[n], number, n, line) for n, line in enumerate(fact.statements)]
        lines.append((depths[-1], number, -1, fact.question + fact.answer + b".\n"))
    lines.sort()
    parts: list[NDArray[np.uint8]] = []
    answers, lookups, begins = [], [], {}
    size_now = before = 0
    for (_, number, statement, line), place in zip(
        lines, tasks.line_ends(text, [depth for depth, *_ in lines]), strict=True
    ):
        parts += [text[before:place], np.frombuffer(line, np.uint8)]
        size_now, before = size_now + place - before, place
        begins[number, statement] = size_now
        if statement < 0:
            fact, answer = facts[number], size_now + len(facts[number].question)
            answers.append((answer - 1, answer - 1 + len(fact.answer)))
            for at, source, there, count in fact.found:
                source_at = begins[number, source] + there
                lookups += [(answer - 1 + at + n, source_at + n) for n in range(count)]
        size_now += len(line)
    return _window(np.concatenate([*parts, text[before:]]), answers, lookups)


def _window(text: NDArray[np.uint8], answers: list[tuple[int, int]], lookups: list[tuple[int, int]]) -> Window:
    """answers: (first, last + 1) rows that foretell one."""
    asked = np.zeros(len(text) - 1, np.bool_)
    for first, stop in answers:
        asked[first:stop] = True
    found = np.asarray(lookups, np.int64).reshape(-1, 2)
    return Window(text[:-1], text[1:].astype(np.int64), asked, found[found[:, 0] < len(text) - 1])
