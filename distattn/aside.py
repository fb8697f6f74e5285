"""A stream of a GPU beside the one on which it computes, for little that the host or another rank waits for.

Tensors that are made there are used there. What is read there and was made elsewhere must be held until the current
stream has waited. On CPUs there is one line of work, and nothing of this does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Inside, work goes to the stream aside, after all work that the current stream has so far."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def after_aside(device: torch.device) -> None:
    """The current stream waits for all work aside so far."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream(device))


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # Its kernels are small, and go first where a multiprocessor becomes free.
    return torch.cuda.Stream(device, priority=-1)
