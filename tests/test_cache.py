"""A cache against attention of whole sequences: any slices, ranks, forks and batches give the same rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from torch import Tensor
from torch.utils._pytree import tree_map

from distattn import cached_levels, presets, reference
from distattn.cache import Cache
from distattn.errors import CacheFull, ConfigError, PlanMismatch
from distattn.extras import AttentionExtras, AttentionPool, Mlp, MlpPool
from distattn.hierarchy_reference import hierarchical
from distattn.jobs.context import Context
from distattn.operators import sent
from distattn.outlook import Outlook, Seen
from distattn.paged import Tiles
from distattn.patterns import Causal, GlobalTokens, SlidingWindow
from distattn.policies import HeaviestPages, SinksAndWindow
from distattn.retrieval import Quest
from distattn.rotary import rotary_table, rotate
from distattn.spec import AttentionSpec
from distattn.watch import set_deadline, watch_of

HEADS, KV_HEADS, DIM = 4, 2, 16
N = 300
STATIC = {
    "dense": presets.dense(),
    "mistral": presets.mistral(50),
    "longformer": presets.longformer(20, 3, (0, 70), causal=True),
    "longformer both ways": presets.longformer(20, global_tokens=(0, 150)),
    "bigbird": presets.bigbird(16, 3, 2, 1, 0, N),
    "strided": presets.sparse_transformer_strided(17),
    "fixed": presets.sparse_transformer_fixed(20, 3),
    "etc": presets.etc((100, 60, 140), 12),
    "streaming_llm": presets.streaming_llm(4, 60),
    "spattention": presets.spattention(HEADS, 200),
}
_LEVELS = {"chunks": (8, 32), "reach": (2,)}
CHOOSING = {
    "combiner": presets.hierarchical(32, **_LEVELS, global_keys=(0, 1, 40)),
    "global queries": presets.hierarchical(32, **_LEVELS, global_tokens=(0, 100)),
    "by tile": presets.hierarchical(32, **_LEVELS, top_k=3, per="tile", global_keys=(0, 1, 40)),
    "by token": presets.hierarchical(32, (16, 64), (2,), top_k=3, global_tokens=(0, 100)),
    "by mass": presets.hierarchical(32, (16, 64), (2,), top_k=3, per="tile", score="mass"),
    "attention pool, a choice a head": presets.hierarchical(32, **_LEVELS, top_k=3, heads="q", pool="attention"),
    "moba": presets.moba(16, 4),
    "moba, long chunks": presets.moba(64, 3),
    "nsa": presets.nsa(16, 8, 32, 4, 40),
}


def rows_of(seed: int, length: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, length, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


def extras_of(spec: AttentionSpec) -> AttentionExtras:
    """Learned parameters, and a rotation; of all N rows."""
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 4

    def mlp(members: int) -> Mlp:
        return Mlp(draw(members, DIM), draw(8, members * DIM), draw(8), draw(DIM, 8))

    pools = []
    for level in spec.summaries:
        members = level.chunk if level is spec.summaries[0] else level.chunk // spec.summaries[0].chunk
        makes = {"mean": lambda: None, "attention": lambda: AttentionPool(draw(KV_HEADS, DIM))}
        makes["mlp"] = lambda members=members: MlpPool(mlp(members), mlp(members))
        pools.append(makes[level.pool]())
    gates = draw(1, N, HEADS, 3) if spec.merge == "gate" else None
    plain = None if spec.is_static else draw(1, N, KV_HEADS, DIM)
    return AttentionExtras(gates, tuple(pools), None, plain, None if spec.is_static else turn)


def turn(keys: Tensor, positions: Tensor) -> Tensor:
    return rotate(keys, *rotary_table(positions.unsqueeze(0), DIM, 1000.0, torch.float64)).to(keys.dtype)


def expected(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not spec.is_static:
        return hierarchical(q, k, v, spec, extras_of(spec)).out
    pattern = spec.tokens if spec.causal else Causal() & spec.tokens
    return reference.attention(q, k, v, pattern)[0]


@dataclass
class Text:
    """A sequence whose rows are known beforehand. done: how many of them were read."""

    sequence: int
    q: Tensor
    k: Tensor
    v: Tensor
    done: int = 0


def run(cache: Cache, texts: list[Text], counts: list[int], out: dict[int, Tensor]) -> None:
    """One step of some texts. out[sequence]: [1, N, heads, dim], zeros in rows that other ranks have."""
    taken = [(text, n) for text, n in zip(texts, counts, strict=True) if n]
    step = cache.begin({text.sequence: n for text, n in taken})
    first, stop = step.mine
    rows = [(text, text.done + i) for text, n in taken for i in range(n)][first:stop]
    assert step.positions.tolist() == [at for _, at in rows]
    for layer in range(len(cache.specs)):
        mine = [
            torch.cat([x[:, at : at + 1] for x, at in ((getattr(text, name), at) for text, at in rows)], 1)
            if rows
            else getattr(taken[0][0], name)[:, :0]
            for name in "qkv"
        ]
        extras = extras_of(cache.specs[layer])
        here = torch.tensor([at for _, at in rows], dtype=torch.int64)
        extras = extras._replace(
            **{n: x[:, here] for n in ("gates", "pool_keys") if (x := getattr(extras, n)) is not None}
        )
        there = tree_map(lambda x: x.to(cache.device) if isinstance(x, Tensor) else x, (mine, extras))
        found = step.attend(layer, *there[0], extras=there[1]).cpu()
        if layer == 0:
            for i, (text, at) in enumerate(rows):
                out[text.sequence][:, at] = found[:, i]
    step.end()
    for text, n in taken:
        text.done += n


def check(context: Context, spec: AttentionSpec, slices: list[list[int]], block_k: int = 32) -> list[np.ndarray]:
    """Each text is read in its slices, all together; returns this rank's rows of each, zeros elsewhere."""
    cache = cache_of(context, [spec, presets.dense()], block_k)
    texts = [Text(cache.add(), *rows_of(seed)) for seed in range(len(slices))]
    out = {text.sequence: torch.zeros(1, N, HEADS, DIM) for text in texts}
    for number in range(max(map(len, slices))):
        run(cache, texts, [part[number] if number < len(part) else 0 for part in slices], out)
    return [out[text.sequence].numpy() for text in texts]


def cache_of(
    context: Context | None, specs: list[AttentionSpec], block_k: int = 32, tokens: int = 1200, **more: Any
) -> Cache:
    mesh = context.mesh if context else None
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    return Cache(specs, tokens=tokens, max_len=N + 20, sequences=3, block_k=block_k, mesh=mesh, **sizes, **more)


@pytest.mark.parametrize("world_size", [1, 3, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 4))])
@pytest.mark.parametrize("name", [*STATIC, *CHOOSING])
def test_any_slices_give_the_rows_of_the_whole(name: str, world_size: int, ranks: RankPool) -> None:
    spec = (STATIC | CHOOSING)[name]
    slices = [[150, 130, 1, 1, 18], [10, 1, 1, 200, 17, 40], [N]]
    parts = ranks(world_size, check, spec, slices)
    for seed, count in enumerate(map(sum, slices)):
        found = torch.from_numpy(np.sum([part[seed] for part in parts], axis=0))[:, :count]
        assert reference.max_error(found, expected(spec, *rows_of(seed))[:, :count]) < 1e-5


@pytest.mark.parametrize("name", [*STATIC, *CHOOSING])
def test_slices_and_tokens_that_are_planned_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = (STATIC | CHOOSING)[name]
    monkeypatch.setattr("distattn.outlook._BLOCK_Q", 32)
    planned, plan = [], Outlook._plan

    def counted(outlook: Outlook, tiles: Tiles, length: int) -> Seen:
        planned.append(length)
        return plan(outlook, tiles, length)

    monkeypatch.setattr(Outlook, "_plan", counted)
    cache = cache_of(None, [spec])
    slices = [64] * 4 + [1] * 12
    wanted = [expected(spec, *rows_of(seed))[:, : sum(slices)] for seed in range(2)]
    for round_ in range(2):  # in the second one all is planned
        texts = [Text(cache.add(), *rows_of(seed)) for seed in range(2)]
        out = {text.sequence: torch.zeros(1, N, HEADS, DIM) for text in texts}
        for count in slices:
            run(cache, texts, [count] * 2, out)
        for text, rows in zip(texts, wanted, strict=True):
            assert reference.max_error(out[text.sequence][:, : sum(slices)], rows) < 1e-5
            cache.free(text.sequence)
        assert planned == [64, 192, 320, 257, 259, 263, 271], round_


@pytest.mark.gpu
@pytest.mark.parametrize("retrieve", [None, Quest(100)], ids=["", "retrieving"])
@pytest.mark.parametrize("name", [*STATIC, *CHOOSING])
def test_kernels_for_gpus_give_the_same(name: str, retrieve: Quest | None) -> None:
    spec = (STATIC | CHOOSING)[name]
    cache = cache_of(None, [spec, presets.dense()], retrieve=retrieve, device="cuda")
    texts = [Text(cache.add(), *rows_of(seed)) for seed in range(2)]
    out = {text.sequence: torch.zeros(1, N, HEADS, DIM) for text in texts}
    for counts in ([150, 0], [1, 40], [1, 1], [9, 100], [100, 1]):
        run(cache, texts, counts, out)
    for text in texts:
        rows = out[text.sequence][:, : text.done]
        assert reference.max_error(rows, expected(spec, text.q, text.k, text.v)[:, : text.done]) < 1e-5


def share_a_prefix(context: Context, spec: AttentionSpec) -> list[np.ndarray]:
    """Three texts that begin alike, one of them forked in the middle of a page from one that goes on meanwhile."""
    cache = cache_of(context, [spec])
    first = Text(cache.add(), *rows_of(0))
    out = {first.sequence: torch.zeros(1, N, HEADS, DIM)}
    run(cache, [first], [110], out)
    before = int((cache.tables.references > 0).sum())
    texts = [first]
    for seed in (1, 2):
        own = [torch.cat((x[:, :110], y[:, 110:]), 1) for x, y in zip(rows_of(0), rows_of(seed), strict=True)]
        texts.append(Text(cache.fork(first.sequence), *own, done=110))
        out[texts[-1].sequence] = out[first.sequence].clone()
    assert int((cache.tables.references > 0).sum()) == before
    for counts in ([1, 1, 0], [40, 3, 0], [0, 0, 120], [1, 50, 1]):
        run(cache, texts, counts, out)
    cache.free(first.sequence)
    run(cache, texts[1:], [20, 1], out)
    return [out[text.sequence].numpy() for text in texts]


@pytest.mark.parametrize("name", ["dense", "streaming_llm", "by tile", "moba"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_forks_share_what_they_begin_with(name: str, world_size: int, ranks: RankPool) -> None:
    spec = (STATIC | CHOOSING)[name]
    parts = ranks(world_size, share_a_prefix, spec)
    for seed, count in enumerate((152, 184, 232)):
        whole = [torch.cat((x[:, :110], y[:, 110:]), 1) for x, y in zip(rows_of(0), rows_of(seed), strict=True)]
        found = torch.from_numpy(np.sum([part[seed] for part in parts], axis=0))[:, :count]
        assert reference.max_error(found, expected(spec, *whole)[:, :count]) < 1e-5


@pytest.mark.parametrize(
    ("specs", "held"),
    [
        ([STATIC["streaming_llm"]], {0, 7, 8, 9}),
        ([STATIC["mistral"], STATIC["streaming_llm"]], {0, 7, 8, 9}),
        ([Causal() & (SlidingWindow(40, 0) | GlobalTokens([70, 310]))], set(range(10))),  # 310 attends to everything
        ([STATIC["mistral"], presets.dense()], set(range(10))),
    ],
    ids=["sinks", "a layer with more", "a query to come", "a dense layer"],
)
def test_what_no_query_visits_again_is_let_go(specs: list[AttentionSpec], held: set[int]) -> None:
    specs = [spec if isinstance(spec, AttentionSpec) else AttentionSpec(spec) for spec in specs]
    cache = cache_of(None, specs)
    text = Text(cache.add(), *rows_of(0))
    out = {text.sequence: torch.zeros(1, N, HEADS, DIM)}
    for count in (100, 90, 99):
        run(cache, [text], [count], out)
    owner, _ = cache.tables.pages(text.sequence)
    assert set(np.flatnonzero(owner >= 0).tolist()) == held
    assert cache.released[text.sequence] == 32 * (10 - len(held))
    assert reference.max_error(out[text.sequence][:, :289], expected(specs[0], *rows_of(0))[:, :289]) < 1e-5


def exchanges_of_a_token(context: Context, spec: AttentionSpec) -> tuple[int, int, list[int]]:
    """Exchanges of a layer as one token is added, bytes that this rank sends in it, and the ranks that it visits."""
    cache = cache_of(context, [spec])
    text = Text(cache.add(), *rows_of(0))
    out = {text.sequence: torch.zeros(1, N, HEADS, DIM)}
    run(cache, [text], [200], out)
    assert cache.group_name is not None
    watch = watch_of(cache.group_name)
    calls, before = watch.calls, sent.total
    run(cache, [text], [1], out)
    owner, _ = cache.tables.pages(text.sequence)
    return watch.calls - calls, sent.total - before, sorted({*owner[-2:].tolist()})


def test_a_token_takes_two_exchanges_with_the_ranks_that_it_visits(ranks: RankPool) -> None:
    found = ranks(4, exchanges_of_a_token, presets.mistral(20))
    visited = found[0][2]
    assert visited == [1, 2] and [calls for calls, _, _ in found] == [2] * 4
    key, query, result = 2 * KV_HEADS * DIM, HEADS * DIM, HEADS * (DIM + 1)
    # Rank 0 computes the row; rank 2 gets its key and value, and both are asked and answer.
    assert [nbytes for _, nbytes, _ in found] == [4 * (2 * query + key), 4 * result, 4 * result, 0]


@pytest.mark.parametrize("spec", [presets.dense(), presets.mistral(120)], ids=["dense", "mistral"])
def test_what_a_policy_lets_go_is_masked_and_nothing_else(spec: AttentionSpec) -> None:
    cache = cache_of(None, [spec], keep=SinksAndWindow(4, 70))
    text = Text(cache.add(), *rows_of(0))
    out, seen = {text.sequence: torch.zeros(1, N, HEADS, DIM)}, np.tri(N, dtype=np.bool_)
    for count in (90, 1, 7, 60, 1, 100, 1, 30):
        owner, _ = cache.tables.pages(text.sequence)
        gone = np.repeat(owner < 0, 32)[: text.done]
        seen[text.done :, : text.done] &= ~gone
        run(cache, [text], [count], out)
    owner, _ = cache.tables.pages(text.sequence)
    dense = spec == presets.dense()  # which goes on to attend to the first page
    assert np.flatnonzero(owner >= 0).tolist() == [0] * dense + [6, 7, 8, 9]
    assert cache.lost[text.sequence] + cache.released[text.sequence] == (5 + (not dense)) * 32
    assert (cache.released[text.sequence] == 0) == dense and cache.lost[text.sequence] > 0
    at = np.arange(N)
    allowed = torch.from_numpy(seen & spec.tokens.allows(at[:, None], at))
    q, k, v = (x.double().transpose(1, 2) for x in rows_of(0))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True).transpose(1, 2)
    assert reference.max_error(out[text.sequence][:, :290], wanted[:, :290]) < 1e-5


def retrieve(context: Context, pages: int) -> list[np.ndarray]:
    """Two texts, one forked from the other; layer 0 retrieves."""
    cache = cache_of(context, [presets.dense(), presets.mistral(40)], retrieve=Quest(pages))
    first = Text(cache.add(), *rows_of(0))
    out = {first.sequence: torch.zeros(1, N, HEADS, DIM)}
    run(cache, [first], [150], out)
    other = Text(cache.fork(first.sequence), *(torch.cat((x[:, :150], y[:, 150:]), 1) for x, y in both()), done=150)
    out[other.sequence] = out[first.sequence].clone()
    for counts in ([1, 0], [15, 1], [0, 16], [3, 2], [100, 1], [9, 10]):
        run(cache, [first, other], counts, out)
    return [out[text.sequence].numpy() for text in (first, other)]


def both() -> list[tuple[Tensor, Tensor]]:
    return list(zip(rows_of(0), rows_of(1), strict=True))


def by_bounds(q: Tensor, k: Tensor, v: Tensor, row: int, pages: int) -> Tensor:
    """A row by Quest's definition, [heads, dim] in float64: its page of 32, and those with the highest bounds."""
    q, k, v = (x[0].double() for x in (q, k, v))
    out = torch.zeros(HEADS, DIM, dtype=torch.float64)
    for head in range(HEADS):
        kv, group = head // 2, q[row, head // 2 * 2 : head // 2 * 2 + 2]
        bounds = []
        for page in range(row // 32):
            keys = k[page * 32 : page * 32 + 32, kv]
            bounds.append(torch.maximum(group * keys.amax(0), group * keys.amin(0)).sum(1).max().item())
        best = sorted(range(len(bounds)), key=lambda page: -bounds[page])[:pages]
        at = [p for page in best for p in range(page * 32, page * 32 + 32)] + list(range(row // 32 * 32, row + 1))
        weights = torch.softmax(k[at, kv] @ q[row, head] * DIM**-0.5, 0)
        out[head] = weights @ v[at, kv]
    return out


@pytest.mark.parametrize("pages", [2, 100])
@pytest.mark.parametrize("world_size", [1, 3])
def test_quest_retrieves_the_pages_with_the_highest_bounds(pages: int, world_size: int, ranks: RankPool) -> None:
    parts = ranks(world_size, retrieve, pages)
    texts = rows_of(0), [torch.cat((x[:, :150], y[:, 150:]), 1) for x, y in both()]
    few = [*range(150, 169), *range(269, 278)], [*range(150, 169), *range(170, 180)]
    for number, (rows, text) in enumerate(zip(few, texts, strict=True)):
        found = torch.from_numpy(np.sum([part[number] for part in parts], axis=0))[0]
        wanted = torch.stack([by_bounds(*text, row, pages) for row in rows])
        assert reference.max_error(found[rows], wanted) < 1e-5
        exact = expected(presets.dense(), *text)[0]
        assert reference.max_error(found[:150], exact[:150]) < 1e-5  # prompts are read exactly
        assert (reference.max_error(found[rows], exact[rows]) < 1e-5) == (pages == 100)


STEPS = (90, 1, 7, 60, 1, 70, 1, 30)


def keep_heaviest(context: Context) -> tuple[list[list[int]], np.ndarray]:
    """The pages that are there after each step, and this rank's rows; two layers of different patterns."""
    specs = [presets.dense(), presets.mistral(100)]
    cache = cache_of(context, specs, keep=HeaviestPages(2, 50, observed=4))
    text, kept = Text(cache.add(), *rows_of(0)), []
    out = {text.sequence: torch.zeros(1, N, HEADS, DIM)}
    for count in STEPS:
        run(cache, [text], [count], out)
        kept.append(np.flatnonzero(cache.tables.pages(text.sequence)[0] >= 0).tolist())
    return kept, out[text.sequence].numpy()


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_heaviest_pages_are_kept(world_size: int, ranks: RankPool) -> None:
    results = ranks(world_size, keep_heaviest)
    found = torch.from_numpy(np.sum([rows for _, rows in results], axis=0))
    q, k, v = (x[0].double().transpose(0, 1) for x in rows_of(0))  # [heads, N, dim]
    scores = torch.einsum("hqd,hkd->hqk", q, k.repeat_interleave(2, 0)) * DIM**-0.5
    at, there, mass, done = np.arange(N), set(range(10)), np.zeros(10), 0
    for kept, count in zip(results[0][0], STEPS, strict=True):
        rows = slice(done, done + count)
        held = np.isin(at // 32, sorted(there))
        for layer, window in enumerate((N, 100)):
            back = at[rows, None] - at
            allowed = torch.from_numpy((back >= 0) & (back < window) & held)
            weights = scores[:, rows].masked_fill(~allowed, -torch.inf).softmax(-1)
            if layer == 0:
                wanted = torch.einsum("hqk,hkd->qhd", weights, v.repeat_interleave(2, 0))
                assert reference.max_error(found[0, rows], wanted) < 1e-5
            observed = weights[:, -min(count, 4) :].sum((0, 1)).numpy()
            mass += np.pad(observed, (0, 20)).reshape(10, 32).sum(1)
        whole = (done + count) // 32
        if whole > done // 32:
            before = [page for page in range(whole) if page in there and (page + 1) * 32 <= done + count - 50]
            there -= set(sorted(before, key=lambda page: -mass[page])[2:])
        done += count
        assert kept == [page for page in sorted(there) if page * 32 < done]
    assert len(kept) < 8 and all(result[0] == results[0][0] for result in results)


def differ(context: Context) -> str:
    """Ranks whose steps differ, after one in which they did not."""
    cache = cache_of(context, [presets.dense()])
    text = Text(cache.add(), *rows_of(0))
    run(cache, [text], [40], {text.sequence: torch.zeros(1, N, HEADS, DIM)})
    set_deadline(2.0)
    try:
        run(cache, [text], [30 + context.rank], {text.sequence: torch.zeros(1, N, HEADS, DIM)})
    except PlanMismatch as error:
        return str(error)
    finally:
        set_deadline(None)
    return "no error"


def test_ranks_whose_steps_differ_are_told(ranks: RankPool) -> None:
    said = ranks(2, differ)
    ranks.close()  # their connections are of no more use
    assert all("bring queries to the cache" in text for text in said), said


def test_a_full_cache_refuses_before_anything_is_written() -> None:
    cache = cache_of(None, [presets.dense()], tokens=128)
    text, out = Text(cache.add(), *rows_of(0)), {0: torch.zeros(1, N, HEADS, DIM)}
    run(cache, [text], [100], out)
    kept = cache.k[0].clone()
    with pytest.raises(CacheFull, match="no room for 31 tokens"):
        cache.begin({cache.add(): 2, text.sequence: 29})
    assert torch.equal(cache.k[0], kept) and cache.tables.length(text.sequence) == 100
    run(cache, [text], [28], out)
    assert reference.max_error(out[0][:, :128], expected(presets.dense(), *rows_of(0))[:, :128]) < 1e-5


def test_values_of_a_sequence_before_do_no_harm() -> None:
    cache = cache_of(None, [presets.dense()], tokens=128)
    text = Text(cache.add(), *rows_of(0))
    text.v[:] = torch.nan
    run(cache, [text], [128], {0: torch.zeros(1, N, HEADS, DIM)})
    cache.free(0)
    text, out = Text(cache.add(), *rows_of(1)), {1: torch.zeros(1, N, HEADS, DIM)}
    run(cache, [text], [40], out)
    assert reference.max_error(out[1][:, :40], expected(presets.dense(), *rows_of(1))[:, :40]) < 1e-5


def test_a_chunk_is_chosen_for_once(monkeypatch) -> None:
    """Where the chunk before chooses for all rows of one: also after a fork, and in a slot that another had before."""
    spec, calls = CHOOSING["by tile"], []
    chooses = cached_levels.choose_chunks
    monkeypatch.setattr(cached_levels, "choose_chunks", lambda *x: calls.append(0) or chooses(*x))
    cache = cache_of(None, [spec, presets.dense()])
    seen = []
    for seed in (0, 1):
        text = Text(cache.add(), *rows_of(seed))
        out = {text.sequence: torch.zeros(1, N, HEADS, DIM)}
        run(cache, [text], [100], out)
        calls.clear()
        for _ in range(20):  # positions 100 to 119, in chunks of 8
            run(cache, [text], [1], out)
        seen.append(len(calls))
        found, right = out[text.sequence][:, :120], expected(spec, *rows_of(seed))[:, :120]
        assert reference.max_error(found, right) < 1e-5
        cache.free(text.sequence)
    assert seen == [3, 3]


def test_bad_arguments_are_refused() -> None:
    cache = cache_of(None, [presets.dense()])
    sequence = cache.add()
    with pytest.raises(ConfigError, match="counts is {0: 0}; expected at least one token"):
        cache.begin({sequence: 0})
    with pytest.raises(ConfigError, match="sequence 0 would have 321 tokens; expected at most max_len, 320"):
        cache.begin({sequence: 321})
    with pytest.raises(ConfigError, match="sequence is 7"):
        cache.begin({7: 1})
    step = cache.begin({sequence: 2})
    q, k, v = (x[:, :2] for x in rows_of(0))
    with pytest.raises(ConfigError, match=r"k is torch.float64 .* expected torch.float32 \(1, 2, 2, 16\)"):
        step.attend(0, q, k.double(), v)
    cache = cache_of(None, [CHOOSING["nsa"]])
    step = cache.begin({cache.add(): 2})
    for extras, why in (
        (AttentionExtras(), r"extras.gates is None None; expected torch.float32 \(1, 2, 4, 3\) on rank 0"),
        (AttentionExtras(torch.zeros(1, 2, 4, 3)), r"extras.pool\[0\] is NoneType; expected MlpPool"),
        (AttentionExtras(key_bias=torch.zeros(1, 2)), "extras.gates is None"),
    ):
        with pytest.raises(ConfigError, match=why):
            step.attend(0, q, k, v, extras=extras)
    for spec, why in (
        (presets.with_delta(presets.dense()), "expected none with a correction"),
        (presets.hierarchical(32, (8,), (), causal=False), "expected a causal one"),
        (presets.hierarchical(32, (8,), (), 3, "tile", lookahead=True), "select.lookahead is True"),
        (presets.nsa(block=512, stride=8), "max_len is 320: seq_len is 320; expected at least 512"),
    ):
        with pytest.raises(ConfigError, match=why):
            cache_of(None, [spec])
    cache = cache_of(None, [CHOOSING["moba"]])
    for _ in range(3):
        cache.add()
    with pytest.raises(ConfigError, match="expected patterns of tokens alone with it, and no retrieval"):
        cache_of(None, [CHOOSING["moba"]], keep=HeaviestPages(2, 50))
    with pytest.raises(ConfigError, match=r"retrieve is Quest\(pages=3\); expected None, or a spec that is"):
        cache_of(None, [presets.mistral(9)], retrieve=Quest(3))
    with pytest.raises(CacheFull, match="there are 3 sequences already"):
        cache.fork(0)
    cache.free(1)
    assert cache.fork(0) == 3
