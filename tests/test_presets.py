"""Presets: each against its paper's formula, written out pair by pair."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from distattn import presets
from distattn.patterns import Causal, Dense, DistanceBand, RandomBlocks
from distattn.presets import PRESETS
from distattn.spec import AttentionSpec

N = 60


def etc_formula(q: int, k: int) -> bool:
    segments = [range(0, 20), range(20, 45), range(45, 55)]
    own = any(q == s.start and k in s for s in segments)
    return abs(q - k) <= 3 or k in (0, 20, 45) or own


def bigbird_formula(q: int, k: int) -> bool:
    return abs(q // 6 - k // 6) <= 1 or k < 12 or q < 12


CASES: list[tuple[str, AttentionSpec, Callable[[int, int], bool]]] = [
    ("dense", presets.dense(), lambda q, k: k <= q),
    ("dense-both-ways", presets.dense(causal=False), lambda q, k: True),
    ("mistral", presets.mistral(7), lambda q, k: 0 <= q - k < 7),
    ("longformer", presets.longformer(5), lambda q, k: abs(q - k) <= 5),
    (
        "longformer-dilated-global",
        presets.longformer(4, dilation=3, global_tokens=(0, 30)),
        lambda q, k: any(k == q + 3 * j for j in range(-4, 5)) or q in (0, 30) or k in (0, 30),
    ),
    (
        "longformer-causal",
        presets.longformer(4, dilation=2, global_tokens=(0, 30), causal=True),
        lambda q, k: k <= q and (any(k == q - 2 * j for j in range(5)) or q in (0, 30) or k in (0, 30)),
    ),
    ("longformer-causal-no-global", presets.longformer(4, causal=True), lambda q, k: 0 <= q - k <= 4),
    ("bigbird-no-random", presets.bigbird(6, 3, 0, 2, seed=0, length=N), bigbird_formula),
    (
        "strided",
        presets.sparse_transformer_strided(8),
        lambda q, k: k in range(max(0, q - 8), q + 1) or (k <= q and (q - k) % 8 == 0),
    ),
    (
        "fixed",
        presets.sparse_transformer_fixed(8, 2),
        lambda q, k: k <= q and (q // 8 == k // 8 or k % 8 in (6, 7)),
    ),
    ("etc", presets.etc([20, 25, 10], radius=3), etc_formula),
    ("streaming-llm", presets.streaming_llm(4, 9), lambda q, k: k <= q and (k < 4 or q - k < 9)),
    ("streaming-llm-no-sinks", presets.streaming_llm(0, 9), lambda q, k: 0 <= q - k < 9),
]


@pytest.mark.parametrize("name, spec, formula", CASES, ids=[case[0] for case in CASES])
def test_formula(name: str, spec: AttentionSpec, formula: Callable[[int, int], bool]) -> None:
    at = np.arange(N)
    wanted = [[formula(q, k) for k in range(N)] for q in range(N)]
    np.testing.assert_array_equal(spec.tokens.allows(at[:, None], at), wanted)


def test_bigbird_random_blocks() -> None:
    spec = presets.bigbird(block=6, window_blocks=3, random_blocks=2, global_blocks=1, seed=3, length=N)
    without = presets.bigbird(6, 3, 0, 1, 3, N).tokens
    assert spec.tokens != presets.bigbird(6, 3, 2, 1, seed=4, length=N).tokens
    at = np.arange(N)
    wanted = without.allows(at[:, None], at) | RandomBlocks(2, 6, 3, N).allows(at[:, None], at)
    np.testing.assert_array_equal(spec.tokens.allows(at[:, None], at), wanted)


@pytest.mark.parametrize("heads, reach", [(4, 60), (3, 50), (7, 7), (1, 10)])
def test_spattention_bands_partition_the_distances(heads: int, reach: int) -> None:
    bands = presets.spattention(heads, reach).tokens.by_head(heads)
    at = np.arange(N)
    counts = sum(band.allows(at[:, None], at).astype(np.int64) for band in bands)
    distance = at[:, None] - at
    np.testing.assert_array_equal(counts, (distance >= 0) & (distance < reach))
    widths = [band.far - band.near for band in bands if isinstance(band, DistanceBand)]
    assert len(widths) == heads and max(widths) - min(widths) <= 1


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: presets.mistral(0), "window is 0"),
        (lambda: presets.longformer(-1), "reach is -1"),
        (lambda: presets.longformer(4, 0), "dilation is 0"),
        (lambda: presets.longformer(4, global_tokens=[-2]), "positions contains -2"),
        (lambda: presets.bigbird(0, 3, 1, 1, 0, 60), "block is 0"),
        (lambda: presets.bigbird(4, 2, 1, 1, 0, 60), "window_blocks is 2"),
        (lambda: presets.bigbird(4, 3, -1, 1, 0, 60), "random_blocks is -1"),
        (lambda: presets.bigbird(4, 3, 1, -1, 0, 60), "global_blocks is -1"),
        (lambda: presets.bigbird(4, 3, 0, 1, -1, 60), "seed is -1"),
        (lambda: presets.bigbird(4, 3, 0, 1, 0, 0), "length is 0"),
        (lambda: presets.sparse_transformer_strided(0), "stride is 0"),
        (lambda: presets.sparse_transformer_fixed(8, 9), "summary is 9"),
        (lambda: presets.etc([3, 0], 2), "segments is 0"),
        (lambda: presets.etc([3], -2), "radius is -2"),
        (lambda: presets.streaming_llm(-1, 4), "sinks is -1"),
        (lambda: presets.streaming_llm(4, 0), "window is 0"),
        (lambda: presets.spattention(0, 10), "heads is 0"),
        (lambda: presets.spattention(8, 7), "reach is 7"),
        (lambda: AttentionSpec("causal"), "tokens is 'causal'"),  # type: ignore[arg-type]
    ],
)
def test_bad_values_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_presets_by_name() -> None:
    here = {name for name, f in vars(presets).items() if getattr(f, "__module__", "") == presets.__name__}
    assert set(PRESETS) == here - {"with_delta"}
    assert all(PRESETS[name] is getattr(presets, name) for name in PRESETS)
    assert PRESETS["dense"]() == AttentionSpec(Causal()) != AttentionSpec(Dense())
    assert hash(presets.mistral(3)) == hash(presets.mistral(3))
    assert repr(presets.dense()) == "AttentionSpec(tokens=Causal())"
