"""How portable kernels are launched: the measured table can be launched, and what it lacks follows rules."""

import itertools

import pytest
import torch

from distattn.kernels.configurations import Configuration, Sizes, by_rule, configuration, measured

KERNELS = ("forward", "queries", "keys")


def check(kernel: str, sizes: Sizes, found: Configuration) -> None:
    assert 16 <= found.columns <= sizes.page_rows
    assert found.rows == sizes.rows if kernel != "keys" else 16 <= found.rows <= sizes.rows
    assert all(n & (n - 1) == 0 for n in (found.columns, found.rows, found.warps))
    assert found.stages >= 1


def test_the_measured_table() -> None:
    table = measured((9, 0))
    assert table
    for (kernel, sizes), found in table.items():
        assert kernel in KERNELS
        check(kernel, sizes, found)
        assert found != by_rule(kernel, torch.bfloat16, sizes)
    assert not measured((0, 0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rules_hold_for_any_sizes(kernel: str, dtype: torch.dtype) -> None:
    for sizes in map(Sizes._make, itertools.product((16, 64, 256), (16, 64, 256), (16, 128, 256))):
        check(kernel, sizes, configuration(kernel, torch.device("cpu"), dtype, sizes))
