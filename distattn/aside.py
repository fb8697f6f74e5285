"""A stream of a GPU beside the one on which it computes, for small work that the host, or another rank, waits for.

While a long launch runs, what is chosen, asked for and packed there comes first wherever a multiprocessor is free. What
is read there was made before the mark after which it begins, or made there, and is held until the current stream has
waited. What is made there goes through :func:`after_aside` to be used elsewhere. On CPUs there is one line of work, and
nothing of this does anything; nor does it in compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Where the current stream is now: all that it has been given so far."""
    if not _has_two(device):
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def aside(device: torch.device, after: torch.cuda.Event | None = None) -> Iterator[None]:
    """Inside, work goes to the stream aside, after what is marked; by default, after all work of the current stream."""
    if not _has_two(device):
        yield
        return
    stream = _stream(device)
    if after is None:
        stream.wait_stream(torch.cuda.current_stream(device))
    else:
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        yield


def after_aside(device: torch.device, *made: Tensor) -> None:
    """The current stream waits for all work aside so far; ``made`` there, tensors are used on this stream, too."""
    if not _has_two(device):
        return
    current = torch.cuda.current_stream(device)
    current.wait_stream(_stream(device))
    for x in made:
        x.record_stream(current)


def _has_two(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.compiler.is_compiling()


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # Its kernels are small, and go first where a multiprocessor becomes free.
    return torch.cuda.Stream(device, priority=-1)
