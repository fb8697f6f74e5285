"""job=generate: what it answers and reports, and the sentences for prompts that it cannot answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from commanding import config_of
from rank_pool import RankPool

from distattn.errors import ConfigError
from distattn.jobs import find_job, generate
from distattn.jobs.context import Context

SMALL = ["model.width=32", "model.hidden=48", "model.head_dim=16", "layout.block_q=64", "layout.block_k=64"]
LEVELS = ["attention.window=128", "attention.reach=[2]", "attention.top_k=3"]


def run_job(context: Context, name: str, overrides: list[str], folder: str) -> dict[str, Any] | None:
    Path(folder).mkdir(exist_ok=True)
    context = Context(context.rank, context.world_size, context.local_rank, context.device, context.mesh, Path(folder))
    return find_job(name).run(config_of(f"job={name}", *overrides), context)


def test_the_answer_is_the_same_on_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("No page is read twice. " * 40)
    overrides = [*SMALL, *LEVELS, f"data.path={text}", "job.samples=2", "job.new_tokens=20", "job.temperature=0.8"]
    files = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        result, *others = ranks(count, run_job, "generate", overrides, str(folder))
        assert not any(others)
        report = json.loads((folder / "report.json").read_text())
        assert (report["prompt_bytes"], report["new_tokens"]) == (920, 40) and len(report["peak_bytes"]) == count
        files.append([(folder / f"answer{n}.txt").read_bytes() for n in range(2)])
        assert "answer 1, 20 bytes (ended by length)" in result["report"]
    assert files[0] == files[1] and files[0][0] != files[0][1]
    assert [len(answer) for answer in files[0]] == [20, 20]


def test_it_says_what_is_lost(ranks: RankPool, tmp_path: Path) -> None:
    prompt = ["job.prompt=" + "abcdefgh" * 100, "job.new_tokens=5", "job.slice_tokens=100"]
    keep = ["job.keep_sinks=4", "job.keep_window=200", "attention=mistral", "attention.window=500"]
    result, _ = ranks(2, run_job, "generate", [*SMALL, *prompt, *keep], str(tmp_path))
    # Of 800 positions those before the page with number 600; the first 300 are of no use later on.
    assert result["lost"][0] + result["released"][0] == 576 and result["lost"][0] > 0 and result["released"][0] > 0
    assert f"lost              {result['lost'][0]} positions" in result["report"]
    keep = ["job.keep_heaviest=2", "job.keep_window=200", "attention=dense"]
    result, _ = ranks(2, run_job, "generate", [*SMALL, *prompt, *keep], str(tmp_path))
    assert result["lost"] == [64 * (12 - 3 - 2)] and result["released"] == [0]


def test_it_reads_what_training_saved(ranks: RankPool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 200)
    small = [*SMALL, "attention=mistral", "attention.window=32", f"data.path={text}", "model.layers=1"]
    steps = ["seq_len=128", "job.steps=60", "job.warmup=5", "job.learning_rate=0.01", "job.save_every=60"]
    ranks(1, run_job, "train", [*small, *steps], str(tmp_path / "run"))
    saved = f"job.checkpoint={tmp_path}/run/checkpoints/step-00000060"
    prompt = ["job.prompt=cdefghabcdefghab", "job.new_tokens=16", "job.stop=fgh", saved]
    result, _ = ranks(2, run_job, "generate", [*small, *prompt], str(tmp_path / "answer"))
    assert (tmp_path / "answer" / "answer0.txt").read_text() == "cde" and result["ended"] == ["stop"]
    with pytest.raises(Exception, match="in which model.width is 32; expected 64"):
        ranks(1, run_job, "generate", [*small, *prompt, "model.width=64"], str(tmp_path / "answer"))


@pytest.mark.parametrize(
    ("content", "overrides", "why"),
    [
        (b"", [], "has no bytes"),
        (b"abc \xff", [], "which is not text: byte 0xff at 4"),
        (b"abc\0", [], "which is not text: it has a zero after 3 characters"),
        (b"a" * 700, ["seq_len=600"], r"there are 700 bytes from data.offset on; expected 1 to 600 \(seq_len\)"),
        (b"a" * 500, ["seq_len=600"], "the prompt has 500 bytes and 256 new ones .* expected at most 600 together"),
        (b"abc", ["data.offset=3"], "there are 0 bytes from data.offset on"),
        (b"abc", ["job.prompt=''"], "the prompt is empty"),
        (b"abc", ["job.samples=0"], "job.samples is 0"),
        (b"abc", ["attention=dense", "layout.head_ranks=2"], "layout.head_ranks is 2; expected 1"),
        (b"abc", ["job.retrieve=4"], "expected null, or attention=dense"),
        (b"abc", ["job.retrieve=0", "attention=dense"], "pages is 0"),
        (b"abc", ["job.keep_sinks=4"], "expected null for all, or keep_window and one of the others"),
        (b"abc", ["job.keep_window=9"], "job.keep_heaviest is None, job.keep_window is 9; expected null for all"),
        (b"abc", ["job.keep_window=9", "job.keep_heaviest=9"], "job.keep_heaviest is 9; expected null, or attention"),
        (b"abc", ["job.keep_sinks=4", "job.keep_window=0"], "sinks is 4 and window 0"),
        (b"abc", ["job.slice_tokens=0"], "slice_tokens is 0"),
        (b"abc", ["attention=nsa"], "has gates or pools that are learned"),
        (b"abc", ["attention.causal=false"], "expected a causal one in a cache"),
    ],
)
def test_what_cannot_be_answered_gets_a_sentence(
    content: bytes, overrides: list[str], why: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        generate.check(config_of("job=generate", f"data.path={text}", *overrides))


def test_a_prompt_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="job.prompt is null and data.path is null, too"):
        generate.check(config_of("job=generate"))
    generate.check(config_of("job=generate", "job.prompt=x"))
