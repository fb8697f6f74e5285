"""What a rank of a service does: it keeps a decoder, and answers one request after the other."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from distattn.conf.schema import Config
from distattn.data import IGNORE
from distattn.generate import Generated, Sampling, generate
from distattn.jobs.context import Context
from distattn.jobs.generate import make_cache
from distattn.jobs.prefill import layer_plans
from distattn.jobs.settings import model_config
from distattn.model import Decoder
from distattn.plan import Plan

_LENGTHS = 8  # lengths of sequences whose plans are kept


class Request(NamedTuple):
    """Read this text: a number that the answer repeats, and uint8 [tokens], the same on every rank."""

    number: int
    tokens: NDArray[np.uint8]


class Prompts(NamedTuple):
    """Go on with these prompts, the same on every rank."""

    number: int
    prompts: tuple[bytes, ...]
    how: Sampling


class Answer(NamedTuple):
    """What came of a request: the sum of the losses of all ranks in nats, and this rank's seconds."""

    number: int
    nats: float
    seconds: float


class Written(NamedTuple):
    """What came of prompts, and this rank's seconds."""

    number: int
    answers: tuple[Generated, ...]
    seconds: float


def serve(
    config: Config, context: Context, receive: Callable[[], Request | Prompts | None], send: Callable[[object], None]
) -> None:
    """Answer requests until None is received.

    Args:
        receive: waits for the next request, which must be the same on every rank.
        send: takes each `Answer` or `Written`.
    """
    model = Decoder(model_config(config), config.seed).to(context.device)

    @lru_cache(_LENGTHS)
    def plans(length: int) -> list[Plan]:
        return layer_plans(dataclasses.replace(config, seq_len=length), context)

    while (request := receive()) is not None:
        start = time.perf_counter()
        if isinstance(request, Prompts):
            answers = tuple(_write(model, config, request, context))
            send(Written(request.number, answers, time.perf_counter() - start))
        else:
            nats = _read(model, plans(len(request.tokens)), request.tokens, context)
            send(Answer(request.number, nats, time.perf_counter() - start))


def labels_of(tokens: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The byte that follows each byte: int64 [tokens], `IGNORE` for the last one, which nothing follows."""
    labels = np.full(len(tokens), IGNORE, dtype=np.int64)
    labels[:-1] = tokens[1:]
    return labels


def _write(model: Decoder, config: Config, request: Prompts, context: Context) -> list[Generated]:
    longest = max(map(len, request.prompts)) + request.how.new_tokens
    cache = make_cache(config, context, longest, len(request.prompts))
    return generate(model, cache, request.prompts, request.how)


@torch.no_grad()
def _read(model: Decoder, plans: list[Plan], tokens: NDArray[np.uint8], context: Context) -> float:
    rows = plans[0].positions.numpy()

    def mine(x: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(x[rows]).unsqueeze(0).to(context.device)

    nats = model.loss(model(mine(tokens), plans), mine(labels_of(tokens))).double().sum()
    if context.mesh is not None:
        dist.all_reduce(nats, group=context.mesh.get_group())
    return float(nats)
