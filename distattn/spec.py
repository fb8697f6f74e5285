"""AttentionSpec: what the user asks for."""

from __future__ import annotations

from dataclasses import dataclass

from distattn.patterns import Pattern


@dataclass(frozen=True)
class AttentionSpec:
    """Who attends to whom: a frozen, hashable value that knows nothing of ranks, heads or lengths.

    tokens: the pattern of exact attention between tokens.

    Raises ValueError if tokens is not a Pattern.
    """

    tokens: Pattern

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Pattern):
            raise ValueError(f"tokens is {self.tokens!r}; expected a Pattern, such as Causal()")
