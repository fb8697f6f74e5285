"""Tasks: lengths are exact, facts are where they are asked for, and the answer follows from the prompt alone."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn import tasks
from distattn.errors import ConfigError

SOURCE = np.frombuffer(b"import os\n\n\ndef name(x):\n    file = 'bytes'\n    return x + 1\n" * 40, np.uint8)


def solve(task: str, prompt: str) -> str:
    """The answer by the task's definition, from nothing but the text: the last line is the question's."""
    *text, asked = prompt.split("\n")
    body = "\n".join(text)

    def only(pattern: str) -> list[str]:
        return re.findall(pattern, body, re.MULTILINE)

    if task in ("niah_single", "niah_multikey", "niah_multivalue"):
        name = re.fullmatch(r"# The access codes? for (\w+) (?:is|are) ", asked)
        assert name
        codes = only(rf"^# The access code for {name[1]} is (\d+)\.$")
        assert len(codes) == (3 if task == "niah_multivalue" else 1)
        return ", ".join(codes)
    if task == "vt":
        value = asked.split()[5]
        names = only(rf"^# The variable (\w+) is {value}\.$")
        chain = dict((old, new) for new, old in re.findall(r"^# The variable (\w+) is that of (\w+)\.$", body, re.M))
        while names[-1] in chain:
            names.append(chain[names[-1]])
        return ", ".join(names)
    if task == "cwe":
        count = Counter(" ".join(only(r"^# List of words: (.*)\.$")).split())
        (_, least), (_, next_one) = count.most_common(4)[2:]
        assert least > next_one
        return ", ".join(sorted(word for word, _ in count.most_common(3)))
    if task == "copy":
        (line,) = only(rf"^{asked}(\w+)\.$")
        return line
    (value,) = only(rf"^\s*{asked}(\w+)'$")
    return value


def least(task: str, seed: int) -> int:
    """The shortest length, as the error says."""
    with pytest.raises(ConfigError, match=f"length is 1; expected at least .* for the task {task}") as error:
        tasks.sample(task, 1, SOURCE, np.random.default_rng(seed))
    found = re.search(r"at least (\d+)", str(error.value))
    assert found
    return int(found[1])


@pytest.mark.parametrize("task", tasks.TASKS)
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_answer_follows_from_the_prompt_at_any_length(task: str, data: st.DataObject, seed: int) -> None:
    length = data.draw(st.integers(least(task, seed), 12_000))
    depth = data.draw(st.none() | st.floats(0, 1))
    sample = tasks.sample(task, length, SOURCE, np.random.default_rng(seed), depth)
    assert len(sample.prompt) + len(sample.answer) == length
    assert solve(task, sample.prompt.decode()) == sample.answer.decode()
    # The evidence is the fact's statements, and they begin lines.
    fact = tasks.TASKS[task].fact(np.random.default_rng(seed))
    assert tuple(sample.prompt[first:stop] for first, stop in sample.evidence) == fact.statements
    assert all(first == 0 or sample.prompt[first - 1 : first] == b"\n" for first, _ in sample.evidence)
    for at, n, there, count in fact.found:
        assert fact.statements[n][there : there + count] == fact.answer[at : at + count]


@pytest.mark.parametrize("task", ("niah_single", "niah_multivalue", "vt", "cwe", "copy"))
@given(depth=st.floats(0, 1), seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_depth_is_kept_to_a_line(task: str, depth: float, seed: int) -> None:
    sample = tasks.sample(task, 20_000, SOURCE, np.random.default_rng(seed), depth)
    fact = tasks.TASKS[task].fact(np.random.default_rng(seed))
    first, stop = sample.evidence[0]
    room = len(sample.prompt) - len(fact.question) - sum(map(len, fact.statements))
    longest = 30  # of a line of the source
    assert depth * room - longest <= first <= depth * room
    assert all(at >= first for at, _ in sample.evidence)


@pytest.mark.parametrize("task", ("niah_multikey", "recall"))
def test_nothing_else_is_said_of_what_is_asked_for(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few names, that the source has as well."""
    monkeypatch.setattr(tasks, "word", lambda rng: ("file", "name", "mode", "code", "data")[rng.integers(5)])
    for seed in range(20):
        sample = tasks.sample(task, 8192, SOURCE, np.random.default_rng(seed))
        assert solve(task, sample.prompt.decode()) == sample.answer.decode()
        assert task != "recall" or not sample.prompt.endswith(b"\nfile = '")


def test_what_cannot_be_drawn_gets_a_sentence() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="task is 'nlah'; expected one of niah_single, niah_multikey, "):
        tasks.sample("nlah", 4096, SOURCE, rng)
    with pytest.raises(ConfigError, match=r"depth is 1.5; expected 0 to 1"):
        tasks.sample("vt", 4096, SOURCE, rng, 1.5)
    own = np.frombuffer(b"# The variable x is 1.\n", np.uint8)
    with pytest.raises(ConfigError, match="text states facts as the task vt does; expected another text"):
        tasks.sample("vt", 4096, own, rng)


def test_the_same_seed_draws_the_same_and_another_another() -> None:
    for task in tasks.TASKS:
        one, same, other = (tasks.sample(task, 4096, SOURCE, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert one == same and one.answer != other.answer
