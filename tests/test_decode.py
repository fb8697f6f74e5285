"""The decode kernels against dense attention in float64: few queries, paged tables, rows cut into pieces."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE

from distattn import reference
from distattn.kernels.decode import Source, decode_attention
from distattn.kernels.masks import Masks
from distattn.kernels.rows import merge_all
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.kernels.table import TileTable
from distattn.levels import packed


class Case(NamedTuple):
    """chosen: a table made on the device, with masks or without; else one with FULL and PARTIAL pages. tables: of heads
    in order. pages: of the cache."""

    rows: int
    pages: int
    block: int
    heads: int = 4
    kv_heads: int = 2
    tables: int = 1
    dim: int = 16
    value_dim: int = 16
    chosen: bool = False
    masked: bool = True
    bias: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "one row, many pages": Case(1, 40, 16),
    "a table a key head, a bias": Case(3, 12, 32, 8, 2, 2, bias=True),
    "a table a head, odd sizes": Case(5, 9, 24, 6, 3, 6, 20, 33),
    "pages in parts, 16 bits": Case(2, 7, 128, 8, 1, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float16),
    "chosen pages with masks": Case(4, 20, 32, 4, 2, 2, chosen=True, bias=True),
    "chosen whole pages": Case(3, 20, 16, 4, 2, 4, chosen=True, masked=False),
}


def table_of(case: Case, seed: int = 0) -> tuple[AnyTable, torch.Tensor]:
    """A table in which the second row visits nothing, and bool [heads, rows, slots]: what it allows."""
    random = np.random.default_rng(seed)
    shape = case.tables, case.rows, case.pages
    kind = random.choice([0, 1, 2], shape, p=[0.3, 0.3, 0.4])  # EMPTY, PARTIAL, FULL
    kind[:, 1:2] = 0
    bits = random.random((*shape, case.block)) < 0.6
    if case.chosen:
        kind = np.where(kind > 0, 1 if case.masked else 2, 0)
    allowed = np.where((kind == 2)[..., None], True, bits) & (kind > 0)[..., None]
    share = case.heads // case.tables
    head_table = tuple(head // share for head in range(case.heads))
    common = {"block_q": 1, "block_k": case.block, "tiles": case.rows, "own_pages": case.pages, "guest_pages": 0}
    everything = torch.from_numpy(np.repeat(allowed, share, axis=0).reshape(case.heads, case.rows, -1)).to(DEVICE)
    flat = kind.reshape(-1, case.pages)
    if case.chosen:
        order = random.permuted(np.broadcast_to(np.arange(case.pages), shape), axis=2)
        pages = np.where(np.take_along_axis(kind, order, 2) > 0, order, -1)
        words = packed(np.take_along_axis(bits, order[..., None], 2).reshape(-1, case.block)).reshape(*shape, 1, -1)
        masks = torch.from_numpy(words).to(DEVICE) if case.masked else None
        selected = torch.from_numpy(pages.astype(np.int32)).to(DEVICE)
        return SelectedTable(**common, head_table=head_table, selected=selected, masks=masks), everything
    ptr = [np.concatenate(([0], (flat == n).sum(1).cumsum())).astype(np.int32) for n in (1, 2)]
    page = [np.nonzero(flat == n)[1].astype(np.int32) for n in (1, 2)]
    words = packed(bits.reshape(-1, case.block)[flat.ravel() == 1]).view(np.uint32)[:, None]
    table = TileTable(
        **common,
        head_table=head_table,
        full_ptr=ptr[1],
        full_first=page[1],
        full_count=np.ones_like(page[1]),
        part_ptr=ptr[0],
        part_page=page[0],
        part_mask=np.arange(len(page[0]), dtype=np.int32),
        masks=Masks(case.block, words),
    )
    return table, everything


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    slots = case.pages * case.block
    shapes = (case.rows, case.heads, case.dim), (slots, case.kv_heads, case.dim), (slots, case.kv_heads, case.value_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, case.dtype) for shape in shapes)
    bias = torch.randn(slots, case.kv_heads, generator=generator).to(DEVICE) if case.bias else None
    return q, k, v, bias


def expected(case: Case, allowed: torch.Tensor, scale: float) -> reference.Part:
    q, k, v, bias = tensors(case)
    share = case.heads // case.kv_heads
    scores = torch.einsum("rhd,shd->hrs", q.double(), k.double().repeat_interleave(share, 1)) * scale
    if bias is not None:
        scores = scores + bias.double().repeat_interleave(share, 1).T[:, None]
    lse = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp() * allowed
    return torch.einsum("hrs,shd->rhd", weights, v.double().repeat_interleave(share, 1)), lse.T


def run(
    engine: str, q: torch.Tensor, sources: list[Source], dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel for GPUs runs in Triton's interpreter where there is none."""
    if engine == "torch" and DEVICE == "cuda":
        pytest.skip("tensors are on a GPU")
    if engine == "torch" or DEVICE == "cuda":
        return decode_attention(q, sources, scale=0.3, dtype=dtype)
    from distattn.kernels import decode_triton

    out = q.new_empty((*q.shape[:2], sources[0].v.shape[2]), dtype=dtype or torch.float32)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    decode_triton.decode(q, sources, out, lse, 0.3)
    return out, lse


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_rows_match_the_oracle(name: str, engine: str) -> None:
    case = CASES[name]
    table, allowed = table_of(case)
    q, k, v, bias = tensors(case)
    out, lse = run(engine, q, [Source(k, v, table, bias)])
    wanted, wanted_lse = expected(case, allowed, 0.3)
    tolerance = 1e-5 if case.dtype == torch.float32 else 5e-3
    assert out.dtype == lse.dtype == torch.float32
    assert reference.max_error(out, wanted) < tolerance
    assert reference.max_error(lse, wanted_lse) < tolerance
    assert case.rows == 1 or bool((lse[1] == -torch.inf).all())


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_sources_share_a_softmax(engine: str) -> None:
    cases = [
        Case(3, 12, 32, 8, 2, 1),
        Case(3, 9, 16, 8, 2, 2, chosen=True, bias=True),
        Case(3, 5, 16, 8, 2, 8, chosen=True, masked=False),
    ]
    found = [(*table_of(case, seed), *tensors(case)) for seed, case in enumerate(cases)]
    q = found[0][2]
    chosen = torch.zeros(1, 3, 0, dtype=torch.int32, device=DEVICE)
    empty = SelectedTable(1, 32, 3, 12, 0, (0,) * 8, chosen)
    sources = [Source(k, v, table, bias) for table, _, _, k, v, bias in found]
    parts = [expected(case, allowed, 0.3) for case, (_, allowed, *_) in zip(cases, found, strict=True)]
    for some in ([0, 1], [0, 1, 2], [2, 0]):
        out, lse = run(engine, q, [sources[n] for n in some], torch.float16)
        wanted, wanted_lse = reference.merge([parts[n] for n in some])
        assert out.dtype == torch.float16 and reference.max_error(out, wanted) < 1e-3
        assert reference.max_error(lse, wanted_lse) < 1e-5 and bool((lse[1] == -torch.inf).all())
    nothing = sources[0]._replace(table=empty)
    out, lse = run(engine, q, [nothing])
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
    out, lse = run(engine, q, [nothing, sources[1]])
    assert reference.max_error(out, parts[1][0]) < 1e-5 and reference.max_error(lse, parts[1][1]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 256])
def test_full_shapes(rows: int) -> None:
    case = Case(rows, 300, 128, 32, 8, 8, 128, 128, dtype=torch.bfloat16)
    table, allowed = table_of(case)
    q, k, v, _ = tensors(case)
    out, lse = decode_attention(q, [Source(k, v, table)], scale=128**-0.5)
    wanted, wanted_lse = expected(case, allowed, 128**-0.5)
    assert reference.max_error(out, wanted) < 1e-2
    assert reference.max_error(lse, wanted_lse) < 1e-2


def test_long_rows_are_cut_and_all_programs_have_similar_work() -> None:
    from distattn.kernels import decode_triton

    table, _ = table_of(Case(4, 200, 16, 8, 2))
    work = decode_triton.split(table, 2, torch.device("cpu"), 40)
    programs = work.programs[: work.launched * decode_triton.PROGRAM].view(-1, decode_triton.PROGRAM).numpy()
    visits = programs[:, 5] - programs[:, 4] + programs[:, 7] - programs[:, 6]
    rows = table.part_pages + table.full_pages
    assert visits.sum() == 2 * rows.sum() and visits.min() > 0
    assert visits.max() <= -(-2 * rows.sum() // 40) < 2 * visits.min()
    assert len(np.unique(programs[:, 3])) * work.heads == work.results == work.launched * work.heads
    places = work.places[: 4 * 8 * 2].view(4, 8, 2).numpy()
    assert places[..., 1].max() == work.most and not places[1, :, 1].any()
    assert set(programs[:, 0]) == {0, 2, 3}  # the second row visits nothing


def test_tables_that_do_not_fit_are_refused() -> None:
    case = CASES["one row, many pages"]
    table, _ = table_of(case)
    q, k, v, _ = tensors(case)
    with pytest.raises(ValueError, match="expected 2 tiles of 1"):
        decode_attention(q.repeat(2, 1, 1), [Source(k, v, table)], scale=1.0)
    with pytest.raises(ValueError, match="which has 624 slots"):
        decode_attention(q, [Source(k[:-16], v[:-16], table)], scale=1.0)


def test_partial_results_are_merged_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    outs, lses = torch.randn(3, 4, 2, 8, generator=generator), torch.randn(3, 4, 2, generator=generator)
    lses[0, 1], lses[:, 2] = -torch.inf, -torch.inf
    outs[0, 1], outs[:, 2] = 0.0, 0.0
    out, lse = merge_all(outs, lses)
    wanted, wanted_lse = reference.merge(list(zip(outs, lses, strict=True)))
    assert reference.max_error(out, wanted) < 1e-6 and reference.max_error(lse, wanted_lse) < 1e-6
    assert bool((out[2] == 0).all()) and bool((lse[2] == -torch.inf).all())
