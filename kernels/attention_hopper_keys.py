"""The pass by key of the backward kernels for Hopper GPUs: dK and dV of a page, see attention_hopper_backward.py.

Products are transposed, [keys, queries], so that weights are the left operand of the next product where they lie.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from distattn.kernels.walk_hopper import (
    GROUP_ROWS,
    HALF_TILE,
    TILE,
    fetch_of_page,
    mask_words_transposed,
    masked_by_transposed,
    packed,
    product_layout,
    store_rows,
    unpacked,
)
from distattn.kernels.walk_triton import (
    LN_2,
    find_item,
    first_full,
    next_full,
    page_length,
    page_rows,
    partial_range,
    slot_of,
)

_STAGES = gl.constexpr(5)  # half tiles of queries, with their gradients, on their way


@gluon.jit
def _fetch_rows(q, grad, start_lse, start_delta, head, row, padded, q_h, grad_h, step, rows):
    q_buffers, grad_buffers, lse_buffers, delta_buffers, full, empty = rows
    stage = step % _STAGES
    mbarrier.wait(empty.index(stage), ((step // _STAGES) & 1) ^ 1)
    barrier = full.index(stage)
    mbarrier.expect(barrier, q.block_type.nbytes + grad.block_type.nbytes + 8 * HALF_TILE)
    tma.async_copy_global_to_shared(q, [row, head * q_h], barrier, q_buffers.index(stage))
    tma.async_copy_global_to_shared(grad, [row, head * grad_h], barrier, grad_buffers.index(stage))
    tma.async_copy_global_to_shared(start_lse, [head * padded + row], barrier, lse_buffers.index(stage))
    tma.async_copy_global_to_shared(start_delta, [head * padded + row], barrier, delta_buffers.index(stage))


@gluon.jit
def _fetch_for_keys(
    q, grad, k, v, guest_k, guest_v, start_lse, start_delta,
    items, item_ptr, units, full_first, full_count, part_tile,
    own_pages, pages, most, padded, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h, k_buffers, v_buffers, page_full, rows,
    ONE_TABLE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches a page and the rows that visit it."""
    item, unit, table, exists = find_item(gl.program_id(0), items, item_ptr, units, most, 1, ONE_TABLE)
    if exists:
        head0 = gl.load(unit + 1)
        kv_head = gl.load(unit + 2)
        page = gl.load(item) - table * pages
        barrier = page_full.index(0)
        mbarrier.expect(barrier, 2 * (k.block_type.nbytes + v.block_type.nbytes))
        for group in gl.static_range(2):
            row = group * GROUP_ROWS
            fetch_of_page(k, guest_k, k_h, guest_k_h, page, own_pages, kv_head, row, barrier, k_buffers.index(group))
            fetch_of_page(v, guest_v, v_h, guest_v_h, page, own_pages, kv_head, row, barrier, v_buffers.index(group))
        begin, end, full = partial_range(item)
        step = 0
        for number in range(gl.load(unit + 3)):
            head = head0 + number
            tile = gl.load(part_tile + begin)  # there is one entry more than needed
            for i in range(begin, end):
                row = tile * TILE
                tile = gl.load(part_tile + i + 1)
                _fetch_rows(q, grad, start_lse, start_delta, head, row, padded, q_h, grad_h, step, rows)
                _fetch_rows(q, grad, start_lse, start_delta, head, row + HALF_TILE, padded, q_h, grad_h, step + 1, rows)
                step += 2
            run, full_tile, left = first_full(item, full_first, full_count)
            for _ in range(full):
                row = full_tile * TILE
                run, full_tile, left = next_full(full_first, full_count, run, full_tile, left, 1)
                _fetch_rows(q, grad, start_lse, start_delta, head, row, padded, q_h, grad_h, step, rows)
                _fetch_rows(q, grad, start_lse, start_delta, head, row + HALF_TILE, padded, q_h, grad_h, step + 1, rows)
                step += 2


@gluon.jit
def _key_step(
    key, value, rows, dk, dv, d_scores, step, scale, masks, mask, half, GROUP: gl.constexpr, MASKED: gl.constexpr,
    ACC: gl.constexpr,
):  # fmt: skip
    """Adds 64 rows: dV of these, dK of the rows before them, so that the matrix unit has work during exponentials."""
    q_buffers, grad_buffers, lse_buffers, delta_buffers, full, empty = rows
    SCORES: gl.constexpr = product_layout(HALF_TILE)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    stage = step % _STAGES
    zero = gl.zeros([GROUP_ROWS, HALF_TILE], gl.float32, SCORES)
    mbarrier.wait(full.index(stage), (step // _STAGES) & 1)
    start, _ = gl.broadcast(gl.expand_dims(lse_buffers.index(stage).load(BY_COLUMN), 0), zero)
    scores = warpgroup_mma(key, q_buffers.index(stage).permute((1, 0)), start, is_async=True)
    # The first step adds zeros here.
    operand = unpacked(d_scores, key.dtype, ACC)
    dk = warpgroup_mma(operand, q_buffers.index(gl.maximum(step - 1, 0) % _STAGES), dk, is_async=True)
    start, _ = gl.broadcast(gl.expand_dims(delta_buffers.index(stage).load(BY_COLUMN), 0), zero)
    products = warpgroup_mma(value, grad_buffers.index(stage).permute((1, 0)), start, is_async=True)
    words = 0
    if MASKED:
        words = mask_words_transposed(masks, mask, half * HALF_TILE, 2 * GROUP, HALF_TILE)
    scores = warpgroup_mma_wait(2, deps=[scores])
    weights = gl.exp2(scores * scale)
    if MASKED:
        weights = masked_by_transposed(words, weights, "0", HALF_TILE)
    operand = gl.convert_layout(weights.to(key.dtype), WEIGHTS)
    dk = warpgroup_mma_wait(1, deps=[dk])
    mbarrier.arrive(empty.index((step + _STAGES - 1) % _STAGES), count=1, pred=step > 0)
    dv = warpgroup_mma(operand, grad_buffers.index(stage), dv, is_async=True)
    products = warpgroup_mma_wait(1, deps=[products])
    d_scores = packed(weights * products, key.dtype)
    dv = warpgroup_mma_wait(0, deps=[dv])
    return dk, dv, d_scores


@gluon.jit
def _multiply_for_keys(
    dk_pages, dv_pages, guest_dk, guest_dv, slot_dk, slot_dv, items, item_ptr, units, part_mask, masks,
    own_rows, own_pages, pages, most, scale_log2, k_buffers, v_buffers, page_full, rows,
    GROUP: gl.constexpr, ONE_TABLE: gl.constexpr, KV_HEADS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """A group of warps: keys GROUP * 64 .. of the page."""
    q_buffers, grad_buffers, lse_buffers, delta_buffers, row_full, row_empty = rows
    DIM: gl.constexpr = k_buffers.shape[2]
    V_DIM: gl.constexpr = v_buffers.shape[2]
    ACC: gl.constexpr = product_layout(DIM)
    V_ACC: gl.constexpr = product_layout(V_DIM)
    item, unit, table, exists = find_item(gl.program_id(0), items, item_ptr, units, most, 1, ONE_TABLE)
    if exists:
        kv_head = gl.load(unit + 2)
        page = gl.load(item) - table * pages
        slot = slot_of(item)
        begin, end, full = partial_range(item)
        key = k_buffers.index(GROUP)
        value = v_buffers.index(GROUP)
        dk = gl.zeros([GROUP_ROWS, DIM], gl.float32, ACC)
        dv = gl.zeros([GROUP_ROWS, V_DIM], gl.float32, V_ACC)
        zero = gl.zeros([GROUP_ROWS, HALF_TILE], gl.float32, product_layout(HALF_TILE))
        d_scores = packed(zero, k_buffers.dtype)
        mbarrier.wait(page_full.index(0), 0)
        step = 0
        for _ in range(gl.load(unit + 3)):
            for i in range(2 * begin, 2 * end):
                mask = gl.load(part_mask + i // 2)
                dk, dv, d_scores = _key_step(
                    key, value, rows, dk, dv, d_scores, step, scale_log2, masks, mask, i % 2, GROUP, True, ACC
                )
                step += 1
            for _i in range(2 * full):
                dk, dv, d_scores = _key_step(
                    key, value, rows, dk, dv, d_scores, step, scale_log2, masks, 0, 0, GROUP, False, ACC
                )
                step += 1
        operand = unpacked(d_scores, k_buffers.dtype, ACC)
        dk = warpgroup_mma(operand, q_buffers.index((step - 1) % _STAGES), dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=[dk]) * (scale_log2 * LN_2)
        if slot < 0:
            length = page_length(page, own_pages, own_rows, 0, TILE)
            at, _ = page_rows(dk_pages, guest_dk, KV_HEADS * DIM, KV_HEADS * DIM, page, own_pages, 0, TILE)
            store_rows(at + kv_head * DIM, KV_HEADS * DIM, length, dk, DIM, GROUP, ADD)
            at, _ = page_rows(dv_pages, guest_dv, KV_HEADS * V_DIM, KV_HEADS * V_DIM, page, own_pages, 0, TILE)
            store_rows(at + kv_head * V_DIM, KV_HEADS * V_DIM, length, dv, V_DIM, GROUP, ADD)
        else:
            first = (slot.to(gl.int64) * KV_HEADS + kv_head) * TILE
            store_rows(slot_dk + first * DIM, DIM, TILE, dk, DIM, GROUP, False)
            store_rows(slot_dv + first * V_DIM, V_DIM, TILE, dv, V_DIM, GROUP, False)


@gluon.jit(do_not_specialize=["own_rows", "own_pages", "pages", "most", "padded"])
def grad_keys(
    q, grad, k, v, guest_k, guest_v, start_lse, start_delta, dk, dv, guest_dk, guest_dv, slot_dk, slot_dv,
    items, item_ptr, units, full_first, full_count, part_tile, part_mask, masks,
    own_rows, own_pages, pages, most, padded, scale_log2, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h,
    ONE_TABLE: gl.constexpr, KV_HEADS: gl.constexpr, ADD: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DIM: gl.constexpr = k.block_type.shape[1]
    V_DIM: gl.constexpr = v.block_type.shape[1]
    k_buffers = gl.allocate_shared_memory(k.dtype, [2, GROUP_ROWS, DIM], k.layout)
    v_buffers = gl.allocate_shared_memory(v.dtype, [2, GROUP_ROWS, V_DIM], v.layout)
    q_buffers = gl.allocate_shared_memory(q.dtype, [_STAGES, HALF_TILE, DIM], q.layout)
    grad_buffers = gl.allocate_shared_memory(grad.dtype, [_STAGES, HALF_TILE, V_DIM], grad.layout)
    lse_buffers = gl.allocate_shared_memory(gl.float32, [_STAGES, HALF_TILE], start_lse.layout)
    delta_buffers = gl.allocate_shared_memory(gl.float32, [_STAGES, HALF_TILE], start_delta.layout)
    page_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    mbarrier.init(page_full.index(0), count=1)
    for i in gl.static_range(_STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    rows = (q_buffers, grad_buffers, lse_buffers, delta_buffers, full, empty)
    # The dialect wants these written in place.
    gl.warp_specialize(
        [
            (_multiply_for_keys, (
                dk, dv, guest_dk, guest_dv, slot_dk, slot_dv, items, item_ptr, units, part_mask, masks,
                own_rows, own_pages, pages, most, scale_log2, k_buffers, v_buffers, page_full, rows, 0, ONE_TABLE,
                KV_HEADS, ADD,
            )),
            (_multiply_for_keys, (
                dk, dv, guest_dk, guest_dv, slot_dk, slot_dv, items, item_ptr, units, part_mask, masks,
                own_rows, own_pages, pages, most, scale_log2, k_buffers, v_buffers, page_full, rows, 1, ONE_TABLE,
                KV_HEADS, ADD,
            )),
            (_fetch_for_keys, (
                q, grad, k, v, guest_k, guest_v, start_lse, start_delta, items, item_ptr, units, full_first, full_count,
                part_tile, own_pages, pages, most, padded, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h,
                k_buffers, v_buffers, page_full, rows, ONE_TABLE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
