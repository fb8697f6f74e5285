"""What the steps of a training run read: drawn from the seed and the step's number, and a step ahead of need."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distattn.conf.schema import Config, TrainConfig
from distattn.data import Corpus
from distattn.kernels.uploads import upload
from distattn.plan import Plan
from distattn.spans import Ints
from distattn.windows import Window, recall_window, text_window

# Bytes of the largest corpus that each rank keeps in memory.
IN_MEMORY = 1 << 30


class Shard:
    """This rank's rows of windows that lie side by side.

    Attributes:
        tokens, labels: [batch, plan.tokens]. weights: float32, the same, of the labels' losses; those of all ranks'
            rows of a window have the sum 1. asked: bool, the same.
        lookups: of each window, see :class:`Window`; of whole windows, on the host.
    """

    def __init__(self, windows: list[Window], plan: Plan, device: torch.device) -> None:
        rows = np.concatenate([np.arange(*segment) for segment in plan.segments] or [np.empty(0, np.int64)])

        def mine(parts: list[NDArray[Any]]) -> NDArray[Any]:
            return np.stack([part[rows] for part in parts])

        arrays = [mine([w.tokens for w in windows]), mine([w.labels for w in windows])]
        arrays += [mine([w.asked for w in windows]), mine([w.weights.astype(np.float32) for w in windows])]
        self.tokens, self.labels, self.asked, self.weights = upload(arrays, device)
        self.lookups = [w.lookups for w in windows]


class Part(NamedTuple):
    """Windows that lie side by side, and the plan of each layer for them."""

    windows: list[Window]
    plans: list[Plan]


class Reader:
    """Windows of a corpus, the same on every rank.

    Those of the next step are drawn on a thread while a step is computed, and planned there if their documents differ.

    Args:
        plans: one a layer.
        pack: plans for documents of these lengths, which share the rows of `plans`; None: windows are read across
            documents, with `plans`.
        group: which of the job.data_ranks groups this rank is in, each of which reads windows of its own.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        plans: list[Plan],
        pack: Callable[[Ints], list[Plan]] | None = None,
        group: int = 0,
    ) -> None:
        assert isinstance(config.job, TrainConfig)
        self._config, self._job, self._group = config, config.job, group
        self._corpus, self._plans, self._pack = corpus.in_memory(IN_MEMORY), plans, pack
        self._thread = ThreadPoolExecutor(1, "windows")
        self._ahead: tuple[int, Future[list[Part]]] | None = None

    def step(self, step: int) -> list[Part]:
        """job.accumulate parts of job.batch windows, those of this rank's group."""
        ahead, self._ahead = self._ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == step else self._draw(step)
        if step < (self._job.until or self._job.steps):
            self._ahead = step + 1, self._thread.submit(self._draw, step + 1)
        return found

    def held_out(self, count: int) -> list[Part]:
        """Windows of text in equal distances, whatever the seed, one a part; of the whole corpus of this reader."""
        size = self._config.seq_len
        last = len(self._corpus) - size - 1
        starts = [last * n // max(count - 1, 1) for n in range(count)]
        return [Part([text_window(self._corpus, first, size)], self._planned(first)) for first in starts]

    def _draw(self, step: int) -> list[Part]:
        first = self._group * self._job.accumulate
        return [self._part(step, part) for part in range(first, first + self._job.accumulate)]

    def _part(self, step: int, part: int) -> Part:
        windows, first = [], 0
        for row in range(self._job.batch):
            rng = random_of(self._config, step, part, row)
            first = window_start(self._config, len(self._corpus), rng)
            if self._job.curriculum == "recall":
                windows.append(recall_window(self._corpus, first, self._config.seq_len, rng))
            else:
                windows.append(text_window(self._corpus, first, self._config.seq_len))
        return Part(windows, self._planned(first))

    def _planned(self, first: int) -> list[Plan]:
        """For the window that begins at this byte."""
        if self._pack is None:
            return self._plans
        plans = self._pack(self._corpus.document_lengths(first, first + self._config.seq_len))
        for plan in plans:
            _ = plan.stages, plan.guest_queries  # what is made when first asked for, here and not in the step
        return plans


def random_of(config: Config, step: int, part: int, row: int) -> np.random.Generator:
    """For a window of a step."""
    return np.random.default_rng((config.seed, step, part, row) if row else (config.seed, step, part))


def window_start(config: Config, length: int, rng: np.random.Generator) -> int:
    """Where in a text of `length` bytes a window begins, from data.offset on.

    A byte follows each window, so that all of its tokens have a label.
    """
    return int(rng.integers(config.data.offset, length - config.seq_len))
