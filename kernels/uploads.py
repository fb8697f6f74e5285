"""Arrays of the host on a device, several at a time, without waiting for it.

A copy from ordinary memory makes the host wait until the device has done all that it was given before: what is planned
step by step would then be planned while the device has nothing to do. From pinned memory it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 16  # bytes: kernels are compiled for tensors that begin at such multiples


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Copies of arrays on a device, of their shapes and dtypes, in one transfer; each begins at a multiple of 16 bytes.

    The device need not have received them when this returns, but what it is given from then on finds them there.
    """
    ends = [0, *accumulate(-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays)]
    staged = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = staged.numpy()
    for array, at in zip(arrays, ends, strict=False):
        flat[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = staged.to(device, non_blocking=True)  # pinned memory is not used anew before it was copied
    found = []
    for array, at in zip(arrays, ends, strict=False):
        copy = there[at : at + array.nbytes].view(_dtype(array.dtype))
        found.append(copy if array.ndim == 1 else copy.view(array.shape))
    return found


@cache
def _dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
