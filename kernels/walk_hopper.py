"""What the kernels for Hopper GPUs share, in Triton's Gluon dialect: layouts, descriptors, and masks from bits.

Every such kernel has a warp, or several, that fetches tiles with the tensor memory accelerator into a ring of buffers
in shared memory, and two groups of four warps that each multiply 64 rows. A buffer has two barriers: "full"
(its bytes have come) and "empty" (both groups have read it). Round r of a ring waits for phase r % 2 of "full" and for
the other phase of "empty", which a fresh barrier passes at once.

Items of work and their visits are walked by the functions of walk_triton.py, which serve in both dialects.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from distattn.kernels.launching import Given, Part

GROUP_ROWS = gl.constexpr(64)
"""Rows that a group of warps multiplies."""
TILE = gl.constexpr(128)
"""Rows of a query tile and of a page: those of two groups."""
HALF_TILE = gl.constexpr(64)
"""Rows of a tile or a page that the backward pass fetches and multiplies at a time."""

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@gluon.constexpr_function
def product_layout(columns):
    """Of a product of 64 rows, made by four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def bits_layout(columns):
    """:func:`product_layout` of [64, columns] seen as [64, columns / 32, 32]: a word of a mask beside its bits."""
    words = [[0, 1 << i, 0] for i in range((columns // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], *words],
        [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, columns // 32, 32],
    )


@gluon.constexpr_function
def bits_layout_transposed(columns):
    """:func:`product_layout` of [64, columns] seen as [2, 32, columns]: 64 keys are two words of a mask's row."""
    far = [[0, 0, 8 << i] for i in range((columns // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 8, 0], *far],
        [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 16, 0], [1, 0, 0]],
        [],
        [2, 32, columns],
    )


@gluon.jit
def fetch_of_page(own, guests, own_h, guest_h, page, own_pages, kv_head, row, barrier, buffer):
    """Fetches rows ``row`` .. of a page, one head, from the rank's own or the guests'."""
    if page < own_pages:
        tma.async_copy_global_to_shared(own, [page * TILE + row, kv_head * own_h], barrier, buffer)
    else:
        tma.async_copy_global_to_shared(guests, [(page - own_pages) * TILE + row, kv_head * guest_h], barrier, buffer)


@gluon.jit
def mask_words(masks, mask, row0, word0, COLUMNS: gl.constexpr):
    """int32 [64, COLUMNS / 32]: words of a mask's rows row0 .. row0 + 63, from word word0 of a row's four."""
    INNER: gl.constexpr = gl.SliceLayout(2, bits_layout(COLUMNS))
    row = row0 + gl.arange(0, 64, gl.SliceLayout(1, INNER))
    word = word0 + gl.arange(0, COLUMNS // 32, gl.SliceLayout(0, INNER))
    return gl.load(masks + mask.to(gl.int64) * 512 + row[:, None] * 4 + word[None, :])


@gluon.jit
def masked_by(words, x, OTHERWISE: gl.constexpr, COLUMNS: gl.constexpr):
    """x [64, COLUMNS], float32 in the layout of a product, or the bits OTHERWISE where :func:`mask_words` say no."""
    LAYOUT: gl.constexpr = bits_layout(COLUMNS)
    bit = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))), 0), 1)
    there = gl.convert_layout(gl.reshape(x, [64, COLUMNS // 32, 32]), LAYOUT, assert_trivial=True)
    # 6: what lanes tell of a bit's number, 25: what registers do, which is a constant in each.
    chosen = _where_bits(gl.expand_dims(words, 2) >> (bit & 6), 1 << (bit & 25), there, OTHERWISE)
    return gl.convert_layout(gl.reshape(chosen, [64, COLUMNS]), product_layout(COLUMNS), assert_trivial=True)


@gluon.jit
def _where_bits(words, bits, x, OTHERWISE: gl.constexpr):
    """x where ``words & bits``, else the number with the bits OTHERWISE."""
    words, bits = gl.broadcast(words, bits)
    # Volatile, so that it stays behind the product that makes x. Otherwise the assembler computes all conditions ahead,
    # and packs what its few predicates cannot hold into registers, bit by bit.
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.b32 $0, $1, " + OTHERWISE + ", p; }",
        "=r,r,r,r",
        [x, words, bits],
        gl.float32,
        False,
        1,
    )


@gluon.jit
def mask_words_transposed(masks, mask, row0, word0, COLUMNS: gl.constexpr):
    """int32 [2, COLUMNS]: two words of a mask's rows row0 .. row0 + COLUMNS - 1, from word word0 of a row's four."""
    INNER: gl.constexpr = gl.SliceLayout(1, bits_layout_transposed(COLUMNS))
    word = word0 + gl.arange(0, 2, gl.SliceLayout(1, INNER))
    row = row0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, INNER))
    return gl.load(masks + mask.to(gl.int64) * 512 + row[None, :] * 4 + word[:, None])


@gluon.jit
def masked_by_transposed(words, x, OTHERWISE: gl.constexpr, COLUMNS: gl.constexpr):
    """:func:`masked_by` for x [64 keys, COLUMNS rows] and :func:`mask_words_transposed`."""
    LAYOUT: gl.constexpr = bits_layout_transposed(COLUMNS)
    bit = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))), 0), 2)
    there = gl.convert_layout(gl.reshape(x, [2, 32, COLUMNS]), LAYOUT, assert_trivial=True)
    # 23: what lanes and warps tell of a bit's number.
    chosen = _where_bits(gl.expand_dims(words, 1) >> (bit & 23), 1 << (bit & 8), there, OTHERWISE)
    return gl.convert_layout(gl.reshape(chosen, [64, COLUMNS]), product_layout(COLUMNS), assert_trivial=True)


@gluon.jit
def packed(x, dtype: gl.constexpr):
    """int32 [rows, columns / 2]: float32 x [rows, columns] as pairs of 16 bits, rounded to nearest.

    For numbers that are carried from one step of a loop to the next: carried as 16 bits each, the assembler takes every
    pair apart and puts it together again.
    """
    low, high = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        words = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], gl.int32, True, 1)
    else:
        words = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], gl.int32, True, 1)
    return words


@gluon.jit
def unpacked(words, dtype: gl.constexpr, ACC: gl.constexpr):
    """What :func:`packed` made, as the left operand of a product in the layout ACC."""
    halves: gl.constexpr = "mov.b32 {$0, $1}, $2;"
    if dtype == gl.bfloat16:
        low, high = gl.inline_asm_elementwise(halves, "=h,=h,r", [words], (gl.bfloat16, gl.bfloat16), True, 1)
    else:
        low, high = gl.inline_asm_elementwise(halves, "=h,=h,r", [words], (gl.float16, gl.float16), True, 1)
    pairs = gl.reshape(gl.join(low, high), [words.shape[0], words.shape[1] * 2])
    return gl.convert_layout(pairs, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)


@gluon.jit
def store_rows(at, stride, rows, values, DIM: gl.constexpr, GROUP: gl.constexpr, ADD: gl.constexpr):
    """Writes values [64, DIM] to rows GROUP * 64 .. of what begins at ``at`` and has ``rows`` rows, or adds them."""
    ACC: gl.constexpr = product_layout(DIM)
    row = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, ACC))
    column = gl.arange(0, DIM, gl.SliceLayout(0, ACC))
    there = at + row.to(gl.int64)[:, None] * stride + column[None, :]
    exists = (row[:, None] < rows) & (column[None, :] < DIM)
    if ADD:
        values += gl.load(there, mask=exists, other=0.0)
    gl.store(there, values.to(at.dtype.element_ty), mask=exists)


def rows_of(given: Given, b: int, rows: int, columns: int | None = None) -> Part:
    """For fetching ``rows`` rows of one head at a time from sequence b of x [batch, tokens, heads, dim].

    See :func:`fetchable`. Rows beyond the last are zeros when read and nowhere when written. columns: of a row, if not
    all at a time.
    """
    _, tokens, heads, dim = given.shape
    _, row, head, _ = given.strides
    shape, block = [tokens, (heads - 1) * head + dim], [rows, columns or dim]
    return given.at(b, lambda x: _descriptor(x, shape, [row, 1], block))


def lines_of(part: Part | Tensor, length: int) -> Part:
    """For fetching ``length`` numbers at a time from a temporary tensor, which has some."""
    assert isinstance(part, Part)
    return part._replace(now=_descriptor(part.now, [part.now.numel()], [1], [length]))


def _descriptor(x: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(shape), list(strides), block, shared_layout(tuple(block), x.dtype))


@lru_cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a block that is fetched and multiplied."""
    # Kept: making one takes as long as all else that a descriptor needs, and a launch makes seven.
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])


def fetchable(x: Tensor) -> bool:
    """Whether one head of some rows of x [batch, tokens, heads, dim] can be fetched, or written, at a time, in place.

    Heads lie beside each other in a token's row (or are all the same), and addresses are multiples of 16 bytes.
    """
    batch, row, head, one = x.stride()
    aligned = all(n * x.element_size() % 16 == 0 for n in (batch, row, head, x.data_ptr() // x.element_size()))
    heads, dim = x.shape[2:]
    return one == 1 and aligned and (heads == 1 or head == 0 or dim <= head) and (heads - 1) * head + dim <= row
