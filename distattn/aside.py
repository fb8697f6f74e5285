"""A stream of a GPU beside the one on which it computes, for what another rank or the host waits for.

Tensors that are made there belong to it: what computes goes on with them after :func:`handed_over`. What is read there
and was made elsewhere must be held until then. On CPUs there is one line of work, and nothing of this does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


@contextmanager
def aside(device: torch.device, after: bool = True) -> Iterator[None]:
    """Inside, work goes to the stream aside.

    after: begins when all work is done that the current stream has so far; else when what was given to the stream
        aside before is done, which then is all that it needs.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    if after:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def handed_over(*tensors: Tensor, there: bool = True) -> None:
    """The current stream goes on with tensors that were made aside.

    there: it waits for all work that went aside so far; else it waits for them otherwise.
    """
    if not tensors or not tensors[0].is_cuda:
        return
    device = tensors[0].device
    current = torch.cuda.current_stream(device)
    if there:
        current.wait_stream(_stream(device))
    for x in tensors:
        x.record_stream(current)  # freed, their memory is not used again before


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # Its kernels are small, and ranks wait for them: they go first.
    return torch.cuda.Stream(device, priority=-1)
