"""The pass by query of the backward kernels for Hopper GPUs: dQ of a query tile, see attention_hopper_backward.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distattn.kernels.walk_hopper import (
    GROUP_ROWS,
    HALF_TILE,
    TILE,
    fetch_of_page,
    mask_words,
    masked_by,
    packed,
    product_layout,
    store_rows,
    unpacked,
)
from distattn.kernels.walk_triton import LN_2, first_full, item_of_round, next_full, partial_range, slot_of

_STAGES = gl.constexpr(5)  # half pages of K, and of V, on their way


@gluon.jit
def _fetch_keys(k, v, guest_k, guest_v, page, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, step, keys):
    """Both halves of a page."""
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = keys
    for half in gl.static_range(2):
        stage = (step + half) % _STAGES
        phase = (((step + half) // _STAGES) & 1) ^ 1
        barrier = k_full.index(stage)
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(barrier, k.block_type.nbytes)
        row = half * HALF_TILE
        fetch_of_page(k, guest_k, k_h, guest_k_h, page, own_pages, kv_head, row, barrier, k_buffers.index(stage))
        barrier = v_full.index(stage)
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(barrier, v.block_type.nbytes)
        fetch_of_page(v, guest_v, v_h, guest_v_h, page, own_pages, kv_head, row, barrier, v_buffers.index(stage))


@gluon.jit
def _fetch_for_queries(
    q, grad, k, v, guest_k, guest_v, items, item_ptr, units, full_first, full_count, part_page,
    own_pages, tiles, most, numbers, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h, queries, keys,
    SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches query tiles, their output's gradients, and the pages that they visit."""
    q_buffers, grad_buffers, q_full, q_empty = queries
    step = 0
    turn = 0
    for first in range(0, numbers, gl.num_programs(0)):
        item, unit, table, exists = item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
        if exists:
            head = gl.load(unit + 1)
            kv_head = gl.load(unit + 2)
            row = (gl.load(item) - table * tiles) * TILE
            begin, end, full = partial_range(item)
            run, full_page, left = first_full(item, full_first, full_count)
            page = gl.load(part_page + begin)  # there is one entry more than needed
            barrier = q_full.index(0)
            mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
            mbarrier.expect(barrier, 2 * (q.block_type.nbytes + grad.block_type.nbytes))
            for group in gl.static_range(2):
                at = row + group * GROUP_ROWS
                tma.async_copy_global_to_shared(q, [at, head * q_h], barrier, q_buffers.index(group))
                tma.async_copy_global_to_shared(grad, [at, head * grad_h], barrier, grad_buffers.index(group))
            for i in range(begin, end):
                at = page
                page = gl.load(part_page + i + 1)
                _fetch_keys(k, v, guest_k, guest_v, at, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, step, keys)
                step += 2
            for _ in range(full):
                at = full_page
                run, full_page, left = next_full(full_first, full_count, run, full_page, left, 1)
                _fetch_keys(k, v, guest_k, guest_v, at, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, step, keys)
                step += 2
            turn += 1


@gluon.jit
def _query_step(
    query, grad, keys, dq, d_scores, start_lse, start_delta, step, scale, fresh, masks, mask, half,
    GROUP: gl.constexpr, MASKED: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Makes dS of 64 keys, while dQ takes in that of the keys before them, unless this is a tile's first step."""
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = keys
    SCORES: gl.constexpr = product_layout(HALF_TILE)
    stage = step % _STAGES
    before = gl.maximum(step - 1, 0) % _STAGES
    zero = gl.zeros([GROUP_ROWS, HALF_TILE], gl.float32, SCORES)
    mbarrier.wait(k_full.index(stage), (step // _STAGES) & 1)
    start, _ = gl.broadcast(gl.expand_dims(start_lse, 1), zero)
    scores = warpgroup_mma(query, k_buffers.index(stage).permute((1, 0)), start, is_async=True)
    # A tile's first step adds zeros here.
    operand = unpacked(d_scores, query.dtype, ACC)
    dq = warpgroup_mma(operand, k_buffers.index(gl.where(fresh != 0, stage, before)), dq, is_async=True)
    mbarrier.wait(v_full.index(stage), (step // _STAGES) & 1)
    start, _ = gl.broadcast(gl.expand_dims(start_delta, 1), zero)
    products = warpgroup_mma(grad, v_buffers.index(stage).permute((1, 0)), start, is_async=True)
    words = 0
    if MASKED:
        words = mask_words(masks, mask, GROUP * GROUP_ROWS, 2 * half, HALF_TILE)
    scores = warpgroup_mma_wait(2, deps=[scores])
    weights = gl.exp2(scores * scale)
    if MASKED:
        weights = masked_by(words, weights, "0", HALF_TILE)
    dq = warpgroup_mma_wait(1, deps=[dq])
    mbarrier.arrive(k_empty.index(before), count=1, pred=fresh == 0)
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(v_empty.index(stage), count=1)
    d_scores = packed(weights * products, query.dtype)
    return dq, d_scores


@gluon.jit
def _multiply_for_queries(
    dq_rows, slots, start_lse, start_delta, items, item_ptr, units, part_mask, masks,
    tokens, tiles, most, numbers, padded, scale_log2, dq_n, dq_h, queries, keys,
    GROUP: gl.constexpr, SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, ALL_HEADS: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    """A group of warps: rows GROUP * 64 .. of each query tile."""
    q_buffers, grad_buffers, q_full, q_empty = queries
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = keys
    DIM: gl.constexpr = k_buffers.shape[2]
    ACC: gl.constexpr = product_layout(DIM)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, product_layout(HALF_TILE))
    query = q_buffers.index(GROUP)
    grad = grad_buffers.index(GROUP)
    step = 0
    turn = 0
    for first in range(0, numbers, gl.num_programs(0)):
        item, unit, table, exists = item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
        if exists:
            head = gl.load(unit + 1)
            tile = gl.load(item) - table * tiles
            slot = slot_of(item)
            begin, end, full = partial_range(item)
            row = tile * TILE + GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, BY_ROW)
            lines = head.to(gl.int64) * padded
            lse = gl.load(start_lse + lines + row)
            delta = gl.load(start_delta + lines + row)
            dq = gl.zeros([GROUP_ROWS, DIM], gl.float32, ACC)
            zero = gl.zeros([GROUP_ROWS, HALF_TILE], gl.float32, product_layout(HALF_TILE))
            d_scores = packed(zero, q_buffers.dtype)
            mbarrier.wait(q_full.index(0), turn & 1)
            fresh = 1
            for i in range(2 * begin, 2 * end):
                mask = gl.load(part_mask + i // 2)
                dq, d_scores = _query_step(
                    query, grad, keys, dq, d_scores, lse, delta, step, scale_log2, fresh, masks, mask, i % 2, GROUP,
                    True, ACC,
                )  # fmt: skip
                step += 1
                fresh = 0
            for _ in range(2 * full):
                dq, d_scores = _query_step(
                    query, grad, keys, dq, d_scores, lse, delta, step, scale_log2, fresh, masks, 0, 0, GROUP, False, ACC
                )
                step += 1
                fresh = 0
            last = (step - 1) % _STAGES
            operand = unpacked(d_scores, q_buffers.dtype, ACC)
            dq = warpgroup_mma(operand, k_buffers.index(last), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq]) * (scale_log2 * LN_2)
            mbarrier.arrive(k_empty.index(last), count=1)
            if slot >= 0:
                at = slots + (slot.to(gl.int64) * ALL_HEADS + head) * TILE * DIM
                store_rows(at, DIM, TILE, dq, DIM, GROUP, False)
            elif ADD:
                at = dq_rows + (tile * TILE).to(gl.int64) * dq_n + head * dq_h
                store_rows(at, dq_n, tokens - tile * TILE, dq, DIM, GROUP, True)
            else:
                query.store(dq.to(q_buffers.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(dq_rows, [tile * TILE + GROUP * GROUP_ROWS, head * dq_h], query)
                tma.store_wait(0)
            mbarrier.arrive(q_empty.index(0), count=1)
            turn += 1


@gluon.jit(do_not_specialize=["tokens", "own_pages", "tiles", "most", "numbers", "padded"])
def grad_queries(
    q, grad, k, v, guest_k, guest_v, start_lse, start_delta, dq, slots,
    items, item_ptr, units, full_first, full_count, part_page, part_mask, masks,
    tokens, own_pages, tiles, most, numbers, padded, scale_log2,
    q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h, dq_n, dq_h,
    SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, ALL_HEADS: gl.constexpr, ADD: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """ADD: dq is a pointer to float32 that is added to, and not a descriptor."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DIM: gl.constexpr = k.block_type.shape[1]
    V_DIM: gl.constexpr = v.block_type.shape[1]
    q_buffers = gl.allocate_shared_memory(q.dtype, [2, GROUP_ROWS, DIM], q.layout)
    grad_buffers = gl.allocate_shared_memory(grad.dtype, [2, GROUP_ROWS, V_DIM], grad.layout)
    k_buffers = gl.allocate_shared_memory(k.dtype, [_STAGES, HALF_TILE, DIM], k.layout)
    v_buffers = gl.allocate_shared_memory(v.dtype, [_STAGES, HALF_TILE, V_DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=2)
    for i in gl.static_range(_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    queries = (q_buffers, grad_buffers, q_full, q_empty)
    keys = (k_buffers, v_buffers, k_full, k_empty, v_full, v_empty)
    # The dialect wants these written in place.
    gl.warp_specialize(
        [
            (_multiply_for_queries, (
                dq, slots, start_lse, start_delta, items, item_ptr, units, part_mask, masks, tokens, tiles,
                most, numbers, padded, scale_log2, dq_n, dq_h, queries, keys, 0, SIDE_BY_SIDE, ONE_TABLE, ALL_HEADS,
                ADD,
            )),
            (_multiply_for_queries, (
                dq, slots, start_lse, start_delta, items, item_ptr, units, part_mask, masks, tokens, tiles,
                most, numbers, padded, scale_log2, dq_n, dq_h, queries, keys, 1, SIDE_BY_SIDE, ONE_TABLE, ALL_HEADS,
                ADD,
            )),
            (_fetch_for_queries, (
                q, grad, k, v, guest_k, guest_v, items, item_ptr, units, full_first, full_count, part_page,
                own_pages, tiles, most, numbers, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h, queries, keys,
                SIDE_BY_SIDE, ONE_TABLE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
