"""The README's examples run as printed, one after the other, and are as short as they should be."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    printed: list[str] = []
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 15
        exec(compile(example, str(README), "exec"), names)
        printed.append(capsys.readouterr().out)
    plan, *_, service = printed
    assert "1,500 tokens on 1 ranks" in plan
    assert float(plan.splitlines()[-1]) < 1e-5
    assert "answered=1" in service.splitlines()[-1]


def test_every_pattern_is_in_the_table() -> None:
    from distattn import patterns

    text = README.read_text()
    nodes = {"And", "Or", "Not", "Pattern"}
    assert not [name for name in patterns.__all__ if name not in nodes and f"`{name}(" not in text]


def test_files_that_it_names_exist() -> None:
    for path in re.findall(r"`((?:scripts|distattn|conf)/[\w/.]+)`|\]\(([\w/.]+)\)", README.read_text()):
        assert (README.parent / (path[0] or path[1])).exists(), path
