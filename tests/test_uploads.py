"""Arrays that go to a device together."""

import numpy as np
import pytest
import torch

from distattn.kernels.uploads import upload


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_arrays_arrive_as_they_are_and_apart(device: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 9, (3, 5)).astype(np.int32),
        np.zeros((0, 4), np.int64),
        rng.random(7) > 0.5,
        rng.integers(0, 9, (4, 6))[::2, 1:],  # not contiguous
        rng.random((2, 3)),
        rng.integers(0, 9, (2, 2, 3)).astype(np.int16),
    ]
    wanted = [torch.from_numpy(array.copy()) for array in arrays]
    found = upload(arrays, torch.device(device))
    for array in arrays:
        array[...] = 0  # these are copies
    for x, y in zip(found, wanted, strict=True):
        assert x.is_contiguous() and x.data_ptr() % 16 == 0 and x.device.type == device
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=0)
