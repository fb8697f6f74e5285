"""AttentionSpec: what the user asks for. Frozen, hashable values that know nothing of ranks, heads or lengths.

In what follows ``i`` is a query's position, N the sequence's length, and a level's chunks are counted from position 0.

**Levels.** With level 0 a window of w_0 chunks of c_1 tokens, and levels l = 1, 2, .. of chunks of c_l tokens that
reach w_l chunks of c_(l+1),

    b_0 = max(0, (floor(i / c_1) - w_0 + 1) c_1)      b_l = max(0, (floor(i / c_(l+1)) - w_l + 1) c_(l+1))

a causal query attends to the tokens in [b_0, i], to the summaries of level l that lie in [b_l, b_(l-1)), and to those
of the last level that lie in [0, b_(L-1)). So every token up to i counts once: by itself or in one summary. A query
that is not causal has the same on its other side, with e_0 = min(N, (floor(i / c_1) + w_0) c_1) and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import or_
from typing import Literal

from distattn.algebra import And, Or, Pattern, PerHead, as_int
from distattn.patterns import Causal, Dilated, DistanceBand, GlobalKeys, GlobalTokens, SlidingWindow
from distattn.segment_patterns import Chunked

POOLS = ("mean", "attention", "mlp")
BIASES = ("count", "learned", "none")
SCORES = ("mean", "mass")
MERGES = ("softmax", "gate")
ALWAYS = ("first", "own", "previous")


class _Told:
    """What is written of a value: its fields, but those that are left at their defaults."""

    def __repr__(self) -> str:
        said = []
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            default = getattr(self, f"_default_{one.name}", one.default)
            if one.repr and value != default:
                said.append(f"{one.name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True, repr=False)
class Summaries(_Told):
    """One level of chunk summaries: a pooled key and a pooled value for each chunk and key/value head.

    Global keys are left out of pooling, since every query attends to them exactly. What a chunk holds besides are its n
    members: tokens at level 1, summaries of the level below at the others. A chunk without a member has no summary.

    chunk: tokens that a summary stands for; the last one of a sequence may stand for fewer.
    stride: from the first token of a summary to that of the next; None: ``chunk``. A smaller one divides ``chunk``;
        then there are summaries of whole chunks only, tokens count more than once, and the merge must be "gate".
    pool: how keys, and likewise values, are pooled, in float32. With members k_j that stand for n_j tokens:
        "mean": sum n_j k_j / sum n_j.
        "attention": weights n_j exp(u.k_j), normalized, with a learned u for each key/value head; the values have the
        weights of the keys (``AttentionExtras.pool``).
        "mlp": W2 silu(W1 [k_j + p_j for all j] + b1), with learned W1, b1, W2 and positions p; one that is left out or
        beyond the end is zeros, without its p (after Yuan et al., "Native Sparse Attention", 2025, equation 7).
    bias: what is added to a summary's scores. "count": log n, n the tokens that it stands for, so that equal keys in a
        chunk give what attending to each would give. "learned": ``AttentionExtras.key_bias``. "none": nothing.
    reach: w_l, how many chunks of the next level this one reaches, the query's own included. None for the last level,
        and only there: it has the rest.

    Raises ValueError for a number or a name that cannot be.
    """

    chunk: int
    stride: int | None = None
    pool: Literal["mean", "attention", "mlp"] = "mean"
    bias: Literal["count", "learned", "none"] = "count"
    reach: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk", as_int("chunk", self.chunk, 1))
        stride = self.chunk if self.stride is None else as_int("stride", self.stride, 1)
        if self.chunk % stride:
            raise ValueError(f"stride is {stride}; expected a divisor of chunk, {self.chunk}")
        object.__setattr__(self, "stride", stride)
        if self.reach is not None:
            object.__setattr__(self, "reach", as_int("reach", self.reach, 1))
        _one_of("pool", self.pool, POOLS)
        _one_of("bias", self.bias, BIASES)

    @property
    def _default_stride(self) -> int:
        return self.chunk

    @property
    def step(self) -> int:
        """``stride``, whether it was given or not."""
        return self.chunk if self.stride is None else self.stride

    @property
    def overlaps(self) -> bool:
        return self.step != self.chunk


@dataclass(frozen=True, repr=False)
class TopChunks(_Told):
    """Chunks that a query chooses by the data, and attends to token by token.

    To choose from are the chunks that end by b_0 (or begin at e_0 or later, where the spec is not causal); with
    ``merge="gate"``, those before the chunk of the query. Under one softmax the tokens of a chosen chunk take the place
    of its summary: that is left out, and where a coarser summary covers the chunk, the remaining ones of the level
    below take its place, so that every token still counts once. Global keys in a chosen chunk count once as well.

    k: how many are chosen, those of ``always`` included; all, where there are fewer.
    chunk: their tokens. With summaries and one softmax that of level 1; without summaries and under one softmax that
        of the window.
    score: "mean": the scale times q.k, k the mean key of the chunk (the key of its summary where level 1 has such
        chunks). "mass": the weight of the chunk's summary in a softmax over the summaries of level 1 that end by the
        query, or over all if the spec is not causal, biases included (Yuan et al., 2025, equations 8 to 10); with
        per="tile" those that end before the tile's first query. A summary that overlaps several chunks counts for
        each as often as it shares a stride with it.
    per: "token": each query chooses for itself. "tile": one choice for all queries of a chunk, by the mean of the
        queries of the chunk before it; the first chunk chooses nothing that is not in ``always``. If the spec is not
        causal, by the mean of their own.
    heads: "kv": one choice for the query heads that share a key/value head, by the sum of their scores (where per is
        "tile", of their mean queries' scores). "q": one for each query head.
    always: chunks that need no score: "first"; and with merge="gate" and per="token" also "own", up to the query if the
        spec is causal, and "previous".
    lookahead: with per="tile" and a causal spec, choose by the mean of the tile's own queries. A row can then depend on
        tokens that follow it: for reading a prompt only.

    Ties go to the lower chunk. Raises ValueError for a number or a name that cannot be.
    """

    k: int
    chunk: int
    score: Literal["mean", "mass"] = "mean"
    per: Literal["token", "tile"] = "token"
    heads: Literal["kv", "q"] = "kv"
    always: tuple[str, ...] = ("first",)
    lookahead: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", as_int("k", self.k, 1))
        object.__setattr__(self, "chunk", as_int("chunk", self.chunk, 1))
        object.__setattr__(self, "always", tuple(self.always))
        _one_of("score", self.score, SCORES)
        _one_of("per", self.per, ("token", "tile"))
        _one_of("heads", self.heads, ("kv", "q"))
        for name in self.always:
            _one_of("always", name, ALWAYS)
        if self.lookahead and self.per != "tile":
            raise ValueError('lookahead is True; expected per="tile" with it, since a token chooses by itself')
        if self.per == "tile" and set(self.always) - {"first"}:
            raise ValueError(f'always is {self.always}; expected no more than ("first",) with per="tile"')


@dataclass(frozen=True, repr=False)
class Delta(_Told):
    """Dense rows that correct a sparse result (Willette et al., "Delta Attention", 2025).

    Rows r = 0, every, 2 every, .. are attended densely as well, and ``o_t = sparse_t + dense_r - sparse_r`` with
    r = every floor(t / every). The last ``every`` rows are dense. The result has no LSE.

    Raises ValueError if every < 1.
    """

    every: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", as_int("every", self.every, 1))


@dataclass(frozen=True, repr=False)
class AttentionSpec(_Told):
    """Who attends to whom.

    tokens: the pattern of exact attention between tokens, level 0. With summaries or a selection and
        ``merge="softmax"`` it is a :func:`chunk_window`.
    summaries: levels 1, 2, ..: each one's chunk divides the next one's.
    select: chunks chosen by the data.
    merge: "softmax": one softmax over everything that a query visits. "gate": one softmax for the tokens, one for the
        summaries and one for the chosen chunks, whose results are added with the weights ``AttentionExtras.gates``.
    correction: of the result.
    registers: the first positions of the sequence are learned tokens, which are global (nn.py puts them there).

    Raises ValueError, which names the argument, if they do not go together.
    """

    tokens: Pattern
    summaries: tuple[Summaries, ...] = ()
    select: TopChunks | None = None
    merge: Literal["softmax", "gate"] = "softmax"
    correction: Delta | None = None
    registers: int = 0
    window: ChunkWindow | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Pattern):
            raise ValueError(f"tokens is {self.tokens!r}; expected a Pattern, such as Causal()")
        object.__setattr__(self, "summaries", tuple(self.summaries))
        if registers := as_int("registers", self.registers, 0):
            tokens = _with_globals(self.tokens, registers)
            object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "window", ChunkWindow.of(self.tokens))
        _one_of("merge", self.merge, MERGES)
        if self.merge == "gate" and not (self.summaries or self.select):
            raise ValueError('merge is "gate"; expected summaries or select with it, since there is one source only')
        self._check_levels()
        if self.select is not None:
            self._check_selection(self.select)

    @property
    def text(self) -> str:
        """For people: the pattern, if there is nothing else; else the whole spec."""
        return repr(self.tokens) if self.is_static and self.correction is None else repr(self)

    @property
    def is_static(self) -> bool:
        """Whether there is nothing but a pattern."""
        return not self.summaries and self.select is None

    @property
    def causal(self) -> bool:
        """Whether the pattern of tokens, as it is written, lets no query attend to what follows it."""
        return _is_causal(self.tokens)

    def _check_levels(self) -> None:
        levels = self.summaries
        if self.merge == "softmax" and not self.is_static and self.window is None:
            raise ValueError(
                f"tokens is {self.tokens!r}; expected a chunk_window with summaries or select under one softmax, "
                'since anything else would count tokens twice (or merge="gate")'
            )
        for number, level in enumerate(levels):
            name = f"summaries[{number}]"
            last = number == len(levels) - 1
            if (level.reach is None) != last:
                found = f"{name}.reach is {level.reach}"
                raise ValueError(f"{found}; expected None for the last level, and a number for the others")
            if not last and levels[number + 1].chunk % level.chunk:
                raise ValueError(f"{name}.chunk is {level.chunk}; expected a divisor of {levels[number + 1].chunk}")
            if level.overlaps and (self.merge != "gate" or len(levels) > 1):
                raise ValueError(
                    f'{name}.stride is {level.stride}; expected {level.chunk}, its chunk, unless merge="gate" and it '
                    "is the only level"
                )
        if self.merge == "gate" and len(levels) > 1:
            raise ValueError(f'summaries has {len(levels)} levels; expected one with merge="gate"')
        if not levels or self.merge == "gate":
            return
        assert self.window is not None
        if self.window.chunk != levels[0].chunk:
            raise ValueError(f"summaries[0].chunk is {levels[0].chunk}; expected {self.window.chunk}, as tokens has")
        before = (self.window.reach - 1) * self.window.chunk
        for number, (level, coarser) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            assert level.reach is not None
            reaches = (level.reach - 1) * coarser.chunk
            if reaches < before:
                raise ValueError(
                    f"summaries[{number}].reach is {level.reach} chunks of {coarser.chunk}; expected at least "
                    f"{-(-before // coarser.chunk) + 1}, since the level below reaches {before} tokens back"
                )
            before = reaches

    def _check_selection(self, select: TopChunks) -> None:
        if self.merge == "softmax":
            assert self.window is not None
            if self.window.chunk != select.chunk:
                raise ValueError(f"select.chunk is {select.chunk}; expected {self.window.chunk}, as tokens has")
            if set(select.always) - {"first"}:
                raise ValueError(
                    f'select.always is {select.always}; expected no more than ("first",) under one softmax'
                )
        if select.score == "mass":
            if not self.summaries:
                raise ValueError('select.score is "mass"; expected summaries with it, whose weights it is')
            level = self.summaries[0]
            if select.chunk % level.step:
                found = f"select.chunk is {select.chunk}"
                raise ValueError(f"{found}; expected a multiple of the stride of summaries[0], {level.step}")


@dataclass(frozen=True)
class ChunkWindow:
    """What :func:`chunk_window` was made of."""

    chunk: int
    reach: int
    causal: bool
    global_tokens: tuple[int, ...]
    global_keys: tuple[int, ...]

    @staticmethod
    def of(pattern: Pattern) -> ChunkWindow | None:
        """None if the pattern is no chunk window."""
        leaves = list(_leaves(pattern))
        chunked = [leaf for leaf in leaves if isinstance(leaf, Chunked)]
        tokens = tuple(n for leaf in leaves if isinstance(leaf, GlobalTokens) for n in leaf.positions)
        keys = tuple(n for leaf in leaves if isinstance(leaf, GlobalKeys) for n in leaf.positions)
        if len(chunked) != 1:
            return None
        found = ChunkWindow(chunked[0].size, chunked[0].before + 1, isinstance(pattern, And), tokens, keys)
        made = chunk_window(found.chunk, found.reach, causal=found.causal, global_tokens=tokens, global_keys=keys)
        return found if made == pattern else None


def chunk_window(
    chunk: int,
    reach: int,
    *,
    causal: bool = True,
    global_tokens: tuple[int, ...] | list[int] | range = (),
    global_keys: tuple[int, ...] | list[int] | range = (),
) -> Pattern:
    """Level 0 of a spec with summaries: the query's chunk of ``chunk`` tokens and ``reach - 1`` whole ones beside it.

    reach: w_0 >= 1, in chunks, before the query if causal, else on either side.
    global_tokens: positions that all queries attend to and that attend to everything.
    global_keys: positions that all queries attend to.
    """
    before = as_int("reach", reach, 1) - 1
    parts: list[Pattern] = [Chunked(chunk, before, 0 if causal else before)]
    if len(global_tokens):
        parts.append(GlobalTokens(global_tokens))
    if len(global_keys):
        parts.append(GlobalKeys(global_keys))
    window = reduce(or_, parts)
    return Causal() & window if causal else window


def _with_globals(pattern: Pattern, registers: int) -> Pattern:
    window = ChunkWindow.of(pattern)
    if window is not None:
        positions = sorted({*range(registers), *window.global_tokens})
        return chunk_window(
            window.chunk,
            window.reach,
            causal=window.causal,
            global_tokens=positions,
            global_keys=window.global_keys,
        )
    both = pattern | GlobalTokens(range(registers))
    return Causal() & both if _is_causal(pattern) else both


def _leaves(pattern: Pattern) -> Iterator[Pattern]:
    if isinstance(pattern, And | Or):
        yield from _leaves(pattern.left)
        yield from _leaves(pattern.right)
    else:
        yield pattern


def _is_causal(pattern: Pattern) -> bool:
    if isinstance(pattern, And):
        return _is_causal(pattern.left) or _is_causal(pattern.right)
    if isinstance(pattern, Or):
        return _is_causal(pattern.left) and _is_causal(pattern.right)
    if isinstance(pattern, PerHead):
        return all(map(_is_causal, pattern.patterns))
    if isinstance(pattern, SlidingWindow | Dilated):
        return pattern.after == 0
    return isinstance(pattern, Causal | DistanceBand)


def _one_of(name: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(names)}")
