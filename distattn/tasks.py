"""Questions about a long text whose answers are known exactly: what a model must find, follow or count in it.

Byte-level versions of tasks of RULER (Hsieh et al., "RULER: what's the real context size of your long-context language
models?", 2024, section 3 and appendix B), with its names where it has them, and two more:

    niah_single      one fact, "The access code for NAME is NUMBER.", is asked for.
    niah_multikey    the same among facts about other names.
    niah_multivalue  a name has three numbers, in three places; all are asked for, in their order.
    vt               variables get the value of one another, in a chain; all that have it are asked for, in order.
    cwe              words are listed, some more often than others; the three most frequent are asked for, by alphabet.
    copy             a line of random letters is to be repeated.
    recall           one of many assignments KEY=VALUE is asked for.

A task is a number of `Fact`s: lines that are planted in a text of the caller's, a question at its end, and the answer.
The question of a fact names it in every chunk of 64 bytes before the answer, so that a choice that is made a chunk
earlier knows what is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from distattn.errors import ConfigError

Bytes = NDArray[np.uint8]
# Of a fact, until one is found that the text says nothing of, such as an assignment to a variable that it has.
_DRAWS = 100


class Fact(NamedTuple):
    """What is stated, asked and answered.

    statements: lines of the text, in their order.
    question: ends where the answer begins.
    answer: what follows.
    found: (first byte in the answer, statement, first byte in it, bytes) of each part of the answer that is stated.
    """

    statements: tuple[bytes, ...]
    question: bytes
    answer: bytes
    found: tuple[tuple[int, int, int, int], ...]


class Sample(NamedTuple):
    """prompt, answer: their lengths together are the length that was asked for.

    evidence: (first, last + 1) bytes of the prompt, a pair for each statement of the fact that is asked for.
    """

    prompt: bytes
    answer: bytes
    evidence: tuple[tuple[int, int], ...]


class Task(NamedTuple):
    """fact: draws what is asked. others: draws lines that only distract, for a text of that many bytes."""

    fact: Callable[[Generator], Fact]
    others: Callable[[Generator, int], Sequence[bytes]]


def sample(name: str, length: int, text: Bytes, rng: Generator, depth: float | None = None) -> Sample:
    """A prompt of a task, planted in a text, and its answer.

    Args:
        name: of TASKS.
        length: bytes of the prompt and the answer together.
        text: what the lines are planted in, uint8 [n]; a part of it that begins anywhere, again from its beginning
            where it is too short.
        rng: everything is drawn from it.
        depth: 0 to 1, where in the text the first statement is and all others follow it; None: anywhere. Lines are
            planted at the next earlier end of a line; the text ends with one.

    Raises:
        ConfigError: there is no such task, depth is out of range, length is too short for it, or the text states facts.
    """
    if name not in TASKS:
        raise ConfigError(f"task is {name!r}; expected one of {', '.join(TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(f"depth is {depth}; expected 0 to 1")
    whole = text.tobytes()
    fact = next((one for one in (TASKS[name].fact(rng) for _ in range(_DRAWS)) if not _states(whole, one)), None)
    if fact is None:
        raise ConfigError(f"text states facts as the task {name} does; expected another text")
    others = [line for line in TASKS[name].others(rng, length) if not _states(line, fact)]
    room = length - sum(map(len, (*fact.statements, fact.question, fact.answer)))
    while others and sum(map(len, others)) > max(room, 0):
        others.pop()
    room -= sum(map(len, others))
    if room < 0:
        raise ConfigError(f"length is {length}; expected at least {length - room} bytes for the task {name}")
    first = int(rng.integers(len(text)))
    around = np.resize(np.roll(text, -first) if first + room > len(text) else text[first:], room)
    if room:
        around = around.copy()
        around[-1] = ord("\n")
    at = np.sort(rng.random(len(fact.statements)))
    if depth is not None:
        at = depth + (1 - depth) * (at - at[0]) / (1 - at[0])
    lines = [*zip(at.tolist(), fact.statements, strict=True), *((float(rng.random()), line) for line in others)]
    order = sorted(range(len(lines)), key=lambda n: lines[n][0])
    places = line_ends(around, [lines[n][0] for n in order])
    parts, begins, size, before = [], {}, 0, 0
    for n, place in zip(order, places, strict=True):
        parts.append(around[before:place].tobytes())
        size, before = size + place - before, place
        begins[n] = size
        parts.append(lines[n][1])
        size += len(lines[n][1])
    prompt = b"".join([*parts, around[before:].tobytes(), fact.question])
    evidence = tuple((begins[n], begins[n] + len(line)) for n, line in enumerate(fact.statements))
    return Sample(prompt, fact.answer, evidence)


def _states(text: bytes, fact: Fact) -> bool:
    """Whether a text begins to say what only the fact's statements may say, such as the code of the same name."""
    return any(fact.statements[n][:there] in text for _, n, there, _ in fact.found)


def line_ends(text: Bytes, depths: Sequence[float]) -> list[int]:
    """For depths in [0, 1], ascending: how many bytes lie before each place, which is at the beginning of a line."""
    begins = np.concatenate(([0], np.flatnonzero(text == ord("\n")) + 1))
    wanted = np.asarray(depths) * len(text)
    found: list[int] = begins[np.searchsorted(begins, wanted, side="right") - 1].tolist()
    return found


def word(rng: Generator) -> str:
    """Two to four syllables of a consonant and a vowel."""
    consonants, vowels = "bcdfghjklmnpqrstvwxz", "aeiou"
    count = int(rng.integers(2, 5))
    return "".join(consonants[rng.integers(20)] + vowels[rng.integers(5)] for _ in range(count))


def words(rng: Generator, count: int) -> list[str]:
    """As many as asked for, no two alike."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(rng)] = None
    return list(found)


def number(rng: Generator) -> str:
    """Six digits."""
    return str(rng.integers(100_000, 1_000_000))


def access_code(rng: Generator) -> Fact:
    """Of niah_single and niah_multikey."""
    name, code = word(rng), number(rng)
    statement = f"# The access code for {name} is {code}.\n"
    return Fact((statement.encode(),), code_question(name), code.encode(), ((0, 0, len(statement) - 8, 6),))


def code_question(name: str) -> bytes:
    """What asks for an access code, up to the code."""
    lines = f"# Somebody asks for the access code for {name}.", f"# What is the access code for {name}?"
    return "\n".join((*lines, f"# The access code for {name} is ")).encode()


def access_codes(rng: Generator) -> Fact:
    """Of niah_multivalue: three codes."""
    name, codes = word(rng), [number(rng) for _ in range(3)]
    statements = [f"# The access code for {name} is {code}.\n" for code in codes]
    lines = f"# Somebody asks for all access codes for {name}.", f"# What are the access codes for {name}?"
    question = "\n".join((*lines, f"# The access codes for {name} are "))
    found = tuple((8 * n, n, len(one) - 8, 6) for n, one in enumerate(statements))
    return Fact(tuple(x.encode() for x in statements), question.encode(), ", ".join(codes).encode(), found)


def variables(rng: Generator) -> Fact:
    """Of vt: four variables, three of which take over the value of another."""
    value, names = number(rng), words(rng, 4)
    statements = [f"# The variable {names[0]} is {value}.\n"]
    statements += [f"# The variable {new} is that of {old}.\n" for old, new in zip(names, names[1:], strict=False)]
    lines = f"# Somebody asks which variables are {value}.", f"# Which variables are {value}?"
    question = "\n".join((*lines, f"# The variables that are {value} are "))
    found, at = [], 0
    for n, name in enumerate(names):
        found.append((at, n, len("# The variable "), len(name)))
        at += len(name) + 2
    return Fact(tuple(x.encode() for x in statements), question.encode(), ", ".join(names).encode(), tuple(found))


def common_words(rng: Generator) -> Fact:
    """Of cwe: 30 words, three of them six times, the others once, in lines of six."""
    found = words(rng, 30)
    most = sorted(found[:3])
    listed = [*found[3:], *most * 6]
    rng.shuffle(listed)
    assert Counter(listed).most_common(3)[2][1] == 6
    lines = [f"# List of words: {' '.join(listed[n : n + 6])}.\n".encode() for n in range(0, len(listed), 6)]
    asked = "# Somebody asks for the three most frequent words.\n# Which words are the most frequent in all lists?\n"
    return Fact(
        tuple(lines), (asked + "# The most frequent words in all lists are ").encode(), ", ".join(most).encode(), ()
    )


def line_of_letters(rng: Generator) -> Fact:
    """Of copy: 24 letters."""
    name, letters = word(rng), "".join(chr(97 + n) for n in rng.integers(0, 26, 24))
    statement = f"# The line of {name} reads {letters}.\n"
    lines = f"# Somebody asks for the line of {name}, to copy it.", f"# How does the line of {name} read?"
    question = "\n".join((*lines, f"# The line of {name} reads "))
    return Fact((statement.encode(),), question.encode(), letters.encode(), ((0, 0, len(statement) - 26, 24),))


def assignment(rng: Generator) -> Fact:
    """Of recall."""
    key, value = word(rng), word(rng)
    statement = f"{key} = {value!r}\n"
    lines = f"# Somebody asks for the value of {key} in this.", f"# What is the value of {key} in this?"
    question = "\n".join((*lines, f"{key} = '"))
    return Fact((statement.encode(),), question.encode(), value.encode(), ((0, 0, len(key) + 4, len(value)),))


def _none(rng: Generator, length: int) -> Sequence[bytes]:
    return ()


def _more(fact: Callable[[Generator], Fact], every: int) -> Callable[[Generator, int], Sequence[bytes]]:
    """The lines of such facts about other names, one for so many bytes of the text, at least 4 and at most 1,000."""

    def lines(rng: Generator, length: int) -> Sequence[bytes]:
        return [line for _ in range(min(max(length // every, 4), 1000)) for line in fact(rng).statements]

    return lines


TASKS = {
    "niah_single": Task(access_code, _none),
    "niah_multikey": Task(access_code, _more(access_code, 1024)),
    "niah_multivalue": Task(access_codes, _none),
    "vt": Task(variables, _none),
    "cwe": Task(common_words, _none),
    "copy": Task(line_of_letters, _none),
    "recall": Task(assignment, _more(assignment, 512)),
}
"""Every task by its name."""
