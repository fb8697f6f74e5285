"""Cases of attention over a tile table with guests, and their check against the float64 oracle, for any kernel."""

from typing import NamedTuple

import numpy as np
import torch

from distattn import reference
from distattn.axis import Axis
from distattn.kernels.attention import Biases, Pages, attention_backward, attention_forward, row_deltas
from distattn.kernels.table import TileTable
from distattn.patterns import Pattern
from distattn.tiles import Extents, assemble, visit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    pattern: Pattern
    length: int
    block_q: int = 16
    block_k: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    batch: int = 1
    scale: float = 0.25
    tokens_first: bool = False
    bias: bool = False


def table_of(case: Case) -> TileTable:
    """Every second page is the rank's own, the others are guests."""
    axes = Axis.grid(case.length, case.block_q), Axis.grid(case.length, case.block_k)
    by_head = case.pattern.by_head(case.heads)
    distinct = list(dict.fromkeys(by_head))
    head_table = [distinct.index(pattern) for pattern in by_head]
    pages = arena(case)
    own = int(np.count_nonzero(pages[0]))
    extents = Extents.of(np.flatnonzero(pages[0]), 0).joined(Extents.of(np.flatnonzero(pages[1]), own))
    parts = [[(visit(pattern, *axes), extents)] for pattern in distinct]
    blocks = case.block_q, case.block_k
    return assemble(parts, head_table, axes[0].blocks, blocks, own, int(np.count_nonzero(pages[1])))


def arena(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """bool [pages]: the rank's own pages, the last among them, and guests."""
    number = np.arange(-(-case.length // case.block_k))[::-1]
    return number % 2 == 0, number % 2 == 1


def split(case: Case, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of own pages and of guests; the last page may be short."""
    own = np.repeat(arena(case)[0], case.block_k)[: case.length]
    return x[:, own], x[:, ~own]


def inputs(case: Case) -> list[torch.Tensor]:
    """q, k, v and gradients of out and lse; heads before tokens in memory unless the case says otherwise."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(case.heads, case.head_dim), (case.kv_heads, case.head_dim), (case.kv_heads, case.value_dim)]
    shapes += [(case.heads, case.value_dim)]
    made = [
        torch.randn(case.batch, heads, case.length, dim, generator=generator).transpose(1, 2).to(DEVICE, case.dtype)
        for heads, dim in shapes
    ]
    if case.tokens_first:
        made = [x.clone(memory_format=torch.contiguous_format) for x in made]
    return [*made, torch.randn(case.batch, case.length, case.heads, generator=generator).to(DEVICE)]


def key_bias(case: Case) -> torch.Tensor:
    """[batch, tokens, kv_heads]; heads before tokens in memory."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.batch, case.kv_heads, case.length, generator=generator).transpose(1, 2).to(DEVICE)


class Result(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    d_own: Pages
    d_guests: Pages
    d_bias: Biases | None


def run(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, grad_lse: torch.Tensor
) -> Result:
    """Forward and backward; the output begins as NaN wherever the kernels are to write it."""
    table = table_of(case)
    own, guests = (Pages(*pair) for pair in zip(split(case, k), split(case, v), strict=True))
    out, lse = torch.full_like(grad, torch.nan), torch.full(q.shape[:3], torch.nan, device=DEVICE)
    if table.has_empty_rows:
        out.zero_(), lse.fill_(-torch.inf)
    bias = Biases(*split(case, key_bias(case))) if case.bias else None
    attention_forward(q, own, guests, table, out, lse, scale=case.scale, bias=bias)
    delta = row_deltas(out, grad, grad_lse)
    dq = torch.zeros(q.shape, device=DEVICE)
    d_own, d_guests = (Pages(*(torch.zeros(x.shape, device=DEVICE) for x in pages)) for pages in (own, guests))
    d_bias = Biases(*(torch.zeros(x.shape, device=DEVICE) for x in bias)) if bias else None
    # In two halves, as a rank does whose guests arrive later.
    far = table.visits_from(table.own_pages)
    for part in (table.subset(far), table.subset(~far)):
        attention_backward(
            q, own, guests, part, grad, lse, delta, dq, d_own, d_guests, scale=case.scale, bias=bias, d_bias=d_bias
        )
    return Result(out, lse, dq, d_own, d_guests, d_bias)


def check(case: Case) -> None:
    """Output, log-sum-exp and all gradients, with uneven gradients of both."""
    q, k, v, grad, grad_lse = inputs(case)
    found = run(case, q, k, v, grad, grad_lse)
    double = [x.double().requires_grad_() for x in (q, k, v)]
    bias = key_bias(case).double().requires_grad_() if case.bias else torch.zeros(k.shape[:3], device=DEVICE)
    # scale q.k + b = scale (q, 1).(k, b / scale): the oracle needs no notion of a bias.
    ones = torch.ones_like(double[0][..., :1])
    long_q, long_k = torch.cat((double[0], ones), -1), torch.cat((double[1], bias.unsqueeze(-1) / case.scale), -1)
    expected, expected_lse = reference.attention(long_q, long_k, double[2], case.pattern, scale=case.scale)
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    assert reference.max_error(found.out, expected) < tolerance
    seen = expected_lse > -torch.inf
    assert torch.equal(found.lse > -torch.inf, seen)
    assert reference.max_error(found.lse[seen], expected_lse[seen]) < tolerance
    loss = (expected * grad).sum() + (expected_lse * grad_lse)[seen].sum()
    wanted = torch.autograd.grad(loss, double, retain_graph=case.bias)
    assert reference.max_error(found.dq, wanted[0]) < tolerance
    for mine, others, full in zip(found.d_own, found.d_guests, wanted[1:], strict=True):
        for grads, part in zip((mine, others), split(case, full), strict=True):
            assert reference.max_error(grads, part) < tolerance
    if found.d_bias:
        (wanted_bias,) = torch.autograd.grad(loss, bias)
        for grads, part in zip(found.d_bias, split(case, wanted_bias), strict=True):
            assert reference.max_error(grads, part) < tolerance
