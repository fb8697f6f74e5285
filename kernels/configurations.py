"""How the portable kernels are launched: sizes of what is multiplied at a time, warps, and stages of the pipeline.

``configurations.csv`` has what measured fastest on a kind of GPU, for 16-bit types; scripts/tune_kernels.py writes it.
What it does not have gets what the rules below say. Nothing is tried out in a user's first step.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "queries", "keys"]
"""The forward kernel, the one that makes dQ, and the one that makes dK and dV."""


class Sizes(NamedTuple):
    """What a configuration is for, all of them powers of two of at least 16.

    rows: (token, head) pairs of a query tile. page_rows: rows of a key page. dim: the larger of the head dimension and
    the value dimension.
    """

    rows: int
    page_rows: int
    dim: int


def taken_together(kernel: Kernel, sizes: Sizes) -> Sizes:
    """The sizes of what is multiplied where tiles and pages are named one by one: several small ones make a large one.

    Of query tiles that fill half of the matrix unit's rows or more, pages are better taken one after the other.
    """
    if kernel == "forward" and sizes.rows <= 32 <= sizes.page_rows:
        return sizes._replace(page_rows=max(sizes.page_rows, 128))
    if kernel == "keys":
        return sizes._replace(rows=max(sizes.rows, 64))
    return sizes


class Configuration(NamedTuple):
    """columns: keys of a page that are multiplied at a time. rows: rows of a query tile; but for "keys", all of them.
    warps: of a program. stages: pages, or query rows, that are on their way at a time."""

    columns: int
    rows: int
    warps: int
    stages: int


@cache
def measured(capability: tuple[int, int]) -> dict[tuple[Kernel, Sizes], Configuration]:
    """The table of a kind of GPU, empty for one that nobody measured."""
    found: dict[tuple[Kernel, Sizes], Configuration] = {}
    text = resources.files(__package__).joinpath("configurations.csv").read_text()
    for line in csv.DictReader(text.splitlines()):
        if line["capability"] == f"{capability[0]}.{capability[1]}":
            sizes = Sizes(int(line["tile_rows"]), int(line["page_rows"]), int(line["dim"]))
            values = (int(line[name]) for name in Configuration._fields)
            found[line["kernel"], sizes] = Configuration(*values)  # type: ignore[index]
    return found


def configuration(kernel: Kernel, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Configuration:
    """What to launch ``kernel`` with."""
    if device.type == "cuda" and dtype != torch.float32:
        table = measured(torch.cuda.get_device_capability(device))
        if (kernel, sizes) in table:
            return table[kernel, sizes]
    return by_rule(kernel, dtype, sizes)


def by_rule(kernel: Kernel, dtype: torch.dtype, sizes: Sizes) -> Configuration:
    """What fits into registers and shared memory of GPUs that nobody measured."""
    rows, page_rows, dim = sizes
    warps = 8 if rows * page_rows > 64 * 64 else 4
    if dtype == torch.float32:
        # Without the matrix unit what a thread multiplies is spelled out: small pieces, or it takes minutes to compile.
        warps = 16 if rows > 64 else 8
        if kernel == "forward":
            return Configuration(min(page_rows, max(16, 2048 // rows)), rows, warps, 2)
        if kernel == "queries":
            return Configuration(min(page_rows, 16), rows, warps, 1)
        return Configuration(min(page_rows, 32), min(rows, 16), 8, 1)
    large = dim > 128
    if kernel == "forward":
        return Configuration(min(page_rows, 64 if large else 128), rows, warps, 2)
    if kernel == "queries":
        return Configuration(min(page_rows, 32 if large else 64), rows, warps, 1 if large else 2)
    return Configuration(min(page_rows, 64 if large else 128), min(rows, 32 if large else 64), warps, 1 if large else 2)
