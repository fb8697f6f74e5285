"""Text that a decoder goes on with: prompts read in slices into a cache, then a token a step for all of them.

Which token follows depends on its scores and on a number that is drawn for the seed, the prompt and the place; so the
text is the same on any number of ranks, as far as rounding does not decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distattn.cache import Cache
from distattn.errors import ConfigError
from distattn.exchange import gather_rows
from distattn.model import Decoder

Told = Callable[[int, bytes], None]
"""told(prompt, text): what is new of the answer to a prompt, on every rank."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a text ends.

    new_tokens: at most so many.
    temperature: by which scores are divided; 0: the token with the highest score, the lower one of equals.
    top_p: draw among the likeliest tokens that have this share of the probability together (Holtzman et al., "The
        curious case of neural text degeneration", 2020, section 3.1).
    seed: of what is drawn.
    stop: bytes at which a text ends, without them; none if empty.

    Raises:
        ConfigError: a number that cannot be.
    """

    new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: bytes = b""

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ConfigError(f"new_tokens is {self.new_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected more than 0 and at most 1")


class Generated(NamedTuple):
    """text: what follows the prompt. tokens: how many were made, those of ``stop`` included. ended: stop or length.

    released, lost: positions of the prompt and the text that the cache let go, see :class:`Cache`.
    """

    text: bytes
    tokens: int
    ended: str
    released: int
    lost: int


class _Answer:
    """The answer to a prompt so far."""

    def __init__(self, number: int, sequence: int, how: Sampling, told: Told) -> None:
        self.number, self.sequence, self._how, self._told = number, sequence, how, told
        self.text, self.ended, self._said = bytearray(), "", 0

    def add(self, token: int) -> None:
        self.text.append(token)
        stop, keep = self._how.stop, 0
        if stop and self.text.endswith(stop):
            self.ended, keep = "stop", len(stop)
        elif len(self.text) == self._how.new_tokens:
            self.ended = "length"
        elif stop:  # what may be the beginning of `stop` is not told yet
            keep = next(n for n in range(len(stop) - 1, -1, -1) if self.text.endswith(stop[:n]))
        if (new := bytes(self.text[self._said : len(self.text) - keep])) != b"":
            self._told(self.number, new)
            self._said += len(new)

    def result(self, cache: Cache) -> Generated:
        counts = cache.released[self.sequence], cache.lost[self.sequence]
        return Generated(bytes(self.text[: self._said]), len(self.text), self.ended, *counts)


@torch.no_grad()
def generate(
    model: Decoder,
    cache: Cache,
    prompts: Sequence[bytes],
    how: Sampling,
    *,
    slice_tokens: int = 4096,
    told: Told = lambda prompt, text: None,
) -> list[Generated]:
    """What follows each prompt. All ranks of the cache call it alike, and all get the results.

    Prompts that are equal are read once. The cache has room for what it held before, the prompts and the answers; what
    was added to it is freed at the end, whatever happens.

    Args:
        cache: of the model's layers, on the model's device.
        slice_tokens: of prompts that are read at a time.

    Raises:
        ConfigError: there is no prompt, one is empty, or it and its answer are longer than a sequence may be.
        CacheFull: there is no room.
    """
    check_prompts(prompts, how, cache.max_len, slice_tokens)
    added: list[int] = []
    try:
        answers: list[_Answer] = []
        for prompt in dict.fromkeys(prompts):
            numbers = [number for number, other in enumerate(prompts) if other == prompt]
            added.append(cache.add())
            hidden, home = _read_prompt(model, cache, added[-1], prompt, slice_tokens)
            added += [cache.fork(added[-1]) for _ in numbers[1:]]
            mine = [_Answer(n, s, how, told) for n, s in zip(numbers, added[-len(numbers) :], strict=True)]
            answers += mine
            _choose(model, cache, hidden.repeat(len(mine), 1), [home] * len(mine), mine, how)
        while running := [answer for answer in answers if not answer.ended]:
            step = cache.begin({answer.sequence: 1 for answer in running})
            tokens = _tokens([answer.text[-1] for answer in running][slice(*step.mine)], cache)
            hidden = model.read(tokens, step)[0]
            _choose(model, cache, hidden, [step.home(row) for row in range(step.rows)], running, how)
        return [answer.result(cache) for answer in sorted(answers, key=lambda answer: answer.number)]
    finally:
        for sequence in added:
            cache.free(sequence)


def check_prompts(prompts: Sequence[bytes], how: Sampling, max_len: int, slice_tokens: int = 1) -> None:
    """Raises ConfigError for what :func:`generate` cannot answer."""
    if slice_tokens < 1:
        raise ConfigError(f"slice_tokens is {slice_tokens}; expected at least 1")
    if not prompts:
        raise ConfigError("prompts is empty; expected at least one")
    for number, prompt in enumerate(prompts):
        which = f"prompt {number + 1}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ConfigError(f"{which} is empty; expected at least one byte")
        if len(prompt) + how.new_tokens > max_len:
            raise ConfigError(
                f"{which} has {len(prompt):,} bytes and {how.new_tokens:,} new ones are asked for; expected at most "
                f"{max_len:,} together, for which there is room"
            )


def _read_prompt(model: Decoder, cache: Cache, sequence: int, prompt: bytes, size: int) -> tuple[Tensor, int]:
    """The last row's hidden state [1, width], or no row on ranks other than its home; and that rank."""
    for first in range(0, len(prompt), size):
        part = prompt[first : first + size]
        step = cache.begin({sequence: len(part)})
        hidden = model.read(_tokens(list(part[slice(*step.mine)]), cache), step)[0]
    home = step.home(step.rows - 1)
    return hidden[-1:] if home == cache.rank else hidden[:0], home


def _tokens(values: list[int], cache: Cache) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=cache.device).unsqueeze(0)


def _choose(
    model: Decoder, cache: Cache, hidden: Tensor, homes: list[int], answers: list[_Answer], how: Sampling
) -> None:
    """Adds the next token to each answer. homes: the rank that has its row of ``hidden``, ascending."""
    mine = [answer for answer, home in zip(answers, homes, strict=True) if home == cache.rank]
    scores = model.logits(hidden).double().cpu().numpy()
    chosen = [
        choose_token(row, how, _uniform(how.seed, answer.number, len(answer.text)))
        for row, answer in zip(scores, mine, strict=True)
    ]
    tokens = torch.tensor(chosen, dtype=torch.int64)
    if cache.group_name is not None:
        counts = np.bincount(homes, minlength=cache.world_size).tolist()
        tokens = torch.cat(gather_rows(tokens.to(cache.device), counts, cache.group_name))
    for answer, token in zip(answers, tokens.tolist(), strict=True):
        answer.add(token)


def choose_token(scores: NDArray[np.float64], how: Sampling, number: float) -> int:
    """A token by its scores [vocab] and a number from [0, 1)."""
    if how.temperature == 0:
        return int(scores.argmax())
    weights = np.exp((scores - scores.max()) / how.temperature)
    order = np.argsort(-weights, kind="stable")
    share = weights[order].cumsum() / weights.sum()
    kept = int(np.searchsorted(share, how.top_p)) + 1
    place = int(np.searchsorted(share[:kept], number * share[min(kept, len(share)) - 1], side="right"))
    return int(order[min(place, kept - 1, len(order) - 1)])


def _uniform(seed: int, prompt: int, place: int) -> float:
    """A number from [0, 1) for a place of an answer, of 53 bits."""
    digest = hashlib.blake2b(f"{seed} {prompt} {place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
