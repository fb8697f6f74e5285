"""What the compiled attention kernels share: which item a program has, walking its visits, and masks from bits.

A program has one item of work (work.py) of one unit of heads. Rows of a query tile are (token, head) pairs, row
``r`` being token ``r // HEADS`` and head ``r % HEADS`` of the unit, so that a tile of few tokens still fills the matrix
unit with the heads that share its keys.
"""

import triton
import triton.language as tl

from distattn.kernels.work import ITEM, UNIT

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every score and finite: keeps exp2(-inf - max) a zero and not a NaN in rows that attend to nothing.
LOWEST = tl.constexpr(-1e30)
ITEM_SIZE = tl.constexpr(ITEM)
UNIT_SIZE = tl.constexpr(UNIT)


@triton.jit
def find_item(number, items, item_ptr, units, most, SIDE_BY_SIDE: tl.constexpr, ONE_TABLE: tl.constexpr):
    """The item of a program: its pointer, a pointer to its unit, its table, and whether there is such an item.

    Programs beside each other have the same item in SIDE_BY_SIDE units that read the same keys, then come the items of
    these units, longest first. With ONE_TABLE the item is known without a load, and there always is one.
    """
    unit = units + ((number // SIDE_BY_SIDE) // most * SIDE_BY_SIDE + number % SIDE_BY_SIDE) * UNIT_SIZE
    index = (number // SIDE_BY_SIDE) % most
    table = index * 0
    exists = index < most
    if not ONE_TABLE:
        table = tl.load(unit)
        index += tl.load(item_ptr + table)
        exists = index < tl.load(item_ptr + table + 1)
    return items + index * ITEM_SIZE, unit, table, exists


@triton.jit
def item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE: tl.constexpr, ONE_TABLE: tl.constexpr):
    """:func:`find_item` of programs that take one of the first ``numbers`` numbers each, round after round.

    A round has the numbers ``first .. first + programs - 1``. Every second one goes backwards, since of items in
    falling order the first program would always get the longest.
    """
    programs = tl.num_programs(0)
    pid = tl.program_id(0)
    number = first + tl.where((first // programs) % 2 == 0, pid, programs - 1 - pid)
    item, unit, table, exists = find_item(
        tl.minimum(number, numbers - 1), items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE
    )
    return item, unit, table, exists & (number < numbers)


@triton.jit
def partial_range(item):
    """Of an item's visits: where its PARTIAL ones begin and end, and how many are FULL."""
    return tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)


@triton.jit
def first_full(item, full_first, full_count):
    """Where an item's FULL visits begin: (run, what is visited, how many are left in the run)."""
    run = tl.load(item + 4)
    skip = tl.load(item + 5)
    return run, tl.load(full_first + run) + skip, tl.load(full_count + run) - skip


@triton.jit
def slot_of(item):
    """Where an item's partial result goes, or -1 if it is the row's only item."""
    return tl.load(item + 6)


@triton.jit
def next_full(full_first, full_count, run, at, left, moves):
    """The FULL visit after (run, at, left), if ``moves`` is 1; the same one if it is 0. No branch: it is pipelined."""
    left -= moves
    ends = left <= 0
    run += ends.to(tl.int32)
    # Both arrays have one entry more than there are runs.
    at = tl.where(ends, tl.load(full_first + run), at + moves)
    return run, at, tl.where(ends, tl.load(full_count + run), left)


@triton.jit
def tile_rows(
    tile, row0, tokens, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, HEADS: tl.constexpr,
    HEADS_2: tl.constexpr,
):  # fmt: skip
    """Of rows row0 .. row0 + ROWS - 1 of a query tile: token in the tile, token of the rank, head, and if it exists.

    With ROWS > TILE_ROWS of several whole tiles: then ``tile`` has the one of each row.
    """
    row = (row0 + tl.arange(0, ROWS)) % TILE_ROWS
    token = row // HEADS_2
    head = row % HEADS_2
    at = tile * BLOCK_Q + token
    return token, at.to(tl.int64), head, (token < BLOCK_Q) & (head < HEADS) & (at < tokens)


@triton.jit
def page_rows(own, guests, own_stride, guest_stride, page, own_pages, sub, BLOCK_K: tl.constexpr):
    """Pointer to row ``sub`` of a page of one head, and the distance from row to row."""
    mine = page < own_pages
    stride = tl.where(mine, own_stride, guest_stride)
    row = tl.where(mine, page, page - own_pages).to(tl.int64) * BLOCK_K + sub
    return tl.where(mine, own, guests) + row * stride, stride


@triton.jit
def page_length(page, own_pages, own_rows, sub, BLOCK_K: tl.constexpr):
    """Rows of a page from row ``sub`` on; the rank's last page may be short."""
    return tl.where(page < own_pages, tl.minimum(own_rows - page * BLOCK_K, BLOCK_K), BLOCK_K) - sub


@triton.jit
def key_biases(
    bias, guest_bias, bias_n, guest_n, page, own_pages, sub, there, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr
):
    """float32 [COLUMNS], in base 2: what is added to the scores of the keys of a page from row ``sub`` on."""
    at, row = page_rows(bias, guest_bias, bias_n, guest_n, page, own_pages, sub, BLOCK_K)
    return tl.load(at + tl.arange(0, COLUMNS) * row, mask=there, other=0.0) * LOG2_E


@triton.jit
def mask_bits(
    masks, mask, token, sub, MASK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """bool [rows, COLUMNS]: whether a row may attend to columns sub .. of a page. Rows beyond the tile may not.

    A mask has MASK_ROWS rows: one for each token of the tile, or one for all.
    """
    WORDS: tl.constexpr = (BLOCK_K + 31) // 32  # of a mask's row
    HERE: tl.constexpr = (COLUMNS + 31) // 32
    word = sub // 32 + tl.arange(0, HERE)
    row = masks + (mask.to(tl.int64) * MASK_ROWS + token % MASK_ROWS) * WORDS
    words = tl.load(row[:, None] + word[None, :], mask=(token < BLOCK_Q)[:, None] & (word < WORDS)[None, :], other=0)
    bits = (words[:, :, None] >> (sub % 32 + tl.arange(0, COLUMNS // HERE))[None, None, :]) & 1
    return tl.reshape(bits, [token.shape[0], COLUMNS]) != 0


@triton.jit
def listed_mask_bits(
    masks, mask_of, first, end, token, MASK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """:func:`mask_bits` of several pages, those of visits first .. (of which the ones from ``end`` on are none), each
    of BLOCK_K columns, a multiple of 32. One row where that stands for all."""
    WORDS: tl.constexpr = BLOCK_K // 32
    HERE: tl.constexpr = COLUMNS // 32
    word = tl.arange(0, HERE)
    visit = first + word // WORDS
    mask = tl.load(mask_of + visit, mask=visit < end, other=0).to(tl.int64) * MASK_ROWS
    if MASK_ROWS == 1:
        words = tl.load(masks + (mask * WORDS + word % WORDS)[None, :], mask=(visit < end)[None, :], other=0)
    else:
        at = masks + (mask[None, :] + token[:, None] % MASK_ROWS) * WORDS + word % WORDS
        words = tl.load(at, mask=(token < BLOCK_Q)[:, None] & (visit < end)[None, :], other=0)
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, [words.shape[0], COLUMNS]) != 0


@triton.jit
def mask_bits_transposed(
    masks, mask, token, sub, MASK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """bool [COLUMNS, rows]: the transpose of :func:`mask_bits`."""
    WORDS: tl.constexpr = (BLOCK_K + 31) // 32
    HERE: tl.constexpr = (COLUMNS + 31) // 32
    word = sub // 32 + tl.arange(0, HERE)
    row = masks + (mask.to(tl.int64) * MASK_ROWS + token % MASK_ROWS) * WORDS
    words = tl.load(row[None, :] + word[:, None], mask=(token < BLOCK_Q)[None, :] & (word < WORDS)[:, None], other=0)
    bits = (words[:, None, :] >> (sub % 32 + tl.arange(0, COLUMNS // HERE))[None, :, None]) & 1
    return tl.reshape(bits, [COLUMNS, token.shape[0]]) != 0
