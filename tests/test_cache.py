"""A cache against attention of whole sequences: any slices, ranks, forks and batches give the same rows."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from torch import Tensor

from distattn import presets, reference
from distattn.cache import Cache
from distattn.errors import CacheFull, ConfigError
from distattn.jobs.context import Context
from distattn.patterns import Causal, GlobalTokens, SlidingWindow
from distattn.spec import AttentionSpec

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


def rows_of(seed: int, length: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, length, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


def expected(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pattern = spec.tokens if spec.causal else Causal() & spec.tokens
    return reference.attention(q, k, v, pattern)[0]


@dataclass
class Text:
    """A sequence whose rows are known beforehand. out: what was attended so far, of rows that some rank computed."""

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
        found = step.attend(layer, *mine)
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


def cache_of(context: Context | None, specs: list[AttentionSpec], block_k: int = 32, tokens: int = 1200) -> Cache:
    mesh = context.mesh if context else None
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    return Cache(specs, tokens=tokens, max_len=N + 20, block_k=block_k, mesh=mesh, **sizes)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", STATIC)
def test_any_slices_give_the_rows_of_the_whole(name: str, world_size: int, ranks: RankPool) -> None:
    spec = STATIC[name]
    slices = [[150, 130, 1, 1, 18], [10, 1, 1, 200, 17, 40], [N]]
    parts = ranks(world_size, check, spec, slices)
    for seed, count in enumerate(map(sum, slices)):
        found = torch.from_numpy(np.sum([part[seed] for part in parts], axis=0))[:, :count]
        assert reference.max_error(found, expected(spec, *rows_of(seed))[:, :count]) < 1e-5


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


@pytest.mark.parametrize("name", ["dense", "streaming_llm"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_forks_share_what_they_begin_with(name: str, world_size: int, ranks: RankPool) -> None:
    parts = ranks(world_size, share_a_prefix, STATIC[name])
    for seed, count in enumerate((152, 184, 232)):
        whole = [torch.cat((x[:, :110], y[:, 110:]), 1) for x, y in zip(rows_of(0), rows_of(seed), strict=True)]
        found = torch.from_numpy(np.sum([part[seed] for part in parts], axis=0))[:, :count]
        assert reference.max_error(found, expected(STATIC[name], *whole)[:, :count]) < 1e-5


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
    with pytest.raises(ConfigError, match="expected patterns of tokens alone"):
        cache_of(None, [presets.with_delta(presets.dense())])
