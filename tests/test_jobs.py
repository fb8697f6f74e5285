"""The jobs themselves, small: what prefill and verify report, and when they fail."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rank_pool import RankPool

from distattn.conf import schema
from distattn.errors import ConfigError
from distattn.jobs import find_job, prefill
from distattn.jobs.context import Context
from distattn.jobs.verify import CASES
from distattn.presets import PRESETS

SMALL = ["seq_len=3001", "model.width=32", "model.hidden=48", "model.head_dim=16"]
WINDOW = ["attention=window_global", "attention.reach=200"]
LEVELS = ["attention.window=128", "attention.reach=[2]", "attention.top_k=3", "attention.global_tokens=[20,700]"]


def config_of(overrides: list[str]) -> Any:
    schema.register()
    with initialize_config_module("distattn.conf", version_base="1.3"):
        return OmegaConf.to_object(compose("config", overrides))


def run_job(context: Context, name: str, overrides: list[str], folder: str) -> dict[str, Any] | None:
    context = Context(context.rank, context.world_size, context.local_rank, context.device, context.mesh, Path(folder))
    return find_job(name).run(config_of([f"job={name}", *overrides]), context)


@pytest.mark.parametrize("attention", [WINDOW, LEVELS], ids=["window", "levels"])
def test_prefill_reports_the_same_on_any_number_of_ranks(attention: list[str], ranks: RankPool, tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        *attention,
        "model.dense_layers=[1]",
        "job.picture=false",
        "layout.block_q=64",
        "layout.block_k=64",
    ]
    reports = []
    for count in (1, 3):
        folder = tmp_path / str(count)
        result, *others = ranks(count, run_job, "prefill", overrides, str(folder))
        assert not any(others)
        assert result["exit_code"] == 0 and result["report"].endswith("exact to the pattern")
        report = json.loads((folder / "report.json").read_text())
        assert report["bytes_planned"] == report["bytes_sent"] and len(report["peak_bytes"]) == count
        assert len(report["max_error"]) == 2 and max(report["max_error"]) < 1e-5
        reports.append(report)
    one, three = reports
    assert three["bits_per_byte"] == pytest.approx(one["bits_per_byte"], abs=1e-5)
    # An untrained model knows nothing of bytes: near log2(256) bits.
    assert 7.5 < one["bits_per_byte"] < 9
    assert three["attention_flops"] == one["attention_flops"] and sum(three["bytes_sent"]) > sum(one["bytes_sent"]) == 0


def test_prefill_reports_the_same_where_ranks_exchange_heads(ranks: RankPool, tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        *WINDOW,
        "model.dense_layers=[1]",
        "job.picture=false",
        "layout.block_q=64",
        "layout.block_k=64",
    ]
    one, four = (
        ranks(count, run_job, "prefill", [*overrides, f"layout.head_ranks={heads}"], str(tmp_path / str(count)))[0]
        for count, heads in ((1, 1), (4, 2))
    )
    assert four["exit_code"] == 0 and four["bytes_planned"] == four["bytes_sent"] and min(four["bytes_sent"]) > 0
    assert four["bits_per_byte"] == pytest.approx(one["bits_per_byte"], abs=1e-5)


def wrong_out(context: Context, overrides: list[str], folder: str) -> int:
    real = prefill.reference.attention_rows
    try:
        prefill.reference.attention_rows = lambda *args, **kwargs: tuple(x + 1e-3 for x in real(*args, **kwargs))  # type: ignore[assignment]
        result = run_job(context, "prefill", overrides, folder)
    finally:
        prefill.reference.attention_rows = real
    assert result is not None and "NOT exact" in result["report"]
    return result["exit_code"]


def test_prefill_fails_when_the_oracle_disagrees(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(1, wrong_out, [*SMALL, *WINDOW, "job.picture=false"], str(tmp_path)) == [1]


def test_prefill_refuses_what_its_decoder_cannot_learn() -> None:
    with pytest.raises(ConfigError, match="attention=nsa has gates or pools that are learned"):
        prefill.check(config_of(["attention=nsa", "seq_len=9000"]))


def test_prefill_refuses_a_text_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("not much")
    with pytest.raises(ConfigError, match="8"):
        prefill.check(config_of([f"data.path={path}", "seq_len=9000"]))


def test_prefill_draws_and_traces(ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    # Little to do: what is traced is every operator.
    overrides = ["seq_len=700", "model.layers=1", *SMALL[1:], "job.trace=true"]
    result = ranks(1, run_job, "prefill", overrides, str(tmp_path))[0]
    assert result["exit_code"] == 0 and (tmp_path / "pattern.png").stat().st_size > 10_000
    trace = json.loads((tmp_path / "trace_rank0.json").read_text())
    assert any("attend" in str(event.get("name")) for event in trace["traceEvents"])


def without_matplotlib(context: Context, overrides: list[str], folder: str) -> dict[str, Any] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # importing it raises ImportError
        return run_job(context, "prefill", overrides, folder)


def test_prefill_reports_without_matplotlib(ranks: RankPool, tmp_path: Path) -> None:
    result = ranks(1, without_matplotlib, ["seq_len=700", "model.layers=1", *SMALL[1:]], str(tmp_path))[0]
    assert result["exit_code"] == 0 and result["report"].endswith("exact to the pattern")
    assert "not drawn: pictures need matplotlib" in result["report"] and not (tmp_path / "pattern.png").exists()


@pytest.mark.full  # .ci/run runs the job itself, on 4 ranks
def test_verify_passes_on_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    result, _ = ranks(2, run_job, "verify", [], str(tmp_path))
    assert result["exit_code"] == 0 and "all within tolerance" in result["report"]


def test_verify_covers_every_preset() -> None:
    assert all(any(case.startswith(name) for case in CASES) for name in PRESETS)


def test_verify_fails_over_a_tolerance_that_nothing_meets(ranks: RankPool, tmp_path: Path) -> None:
    result = ranks(1, run_job, "verify", ["job.tolerance_float32=1e-12"], str(tmp_path))[0]
    assert result["exit_code"] == 1 and "NOT within tolerance" in result["report"]


def test_plan_answers_for_a_thousand_ranks(tmp_path: Path) -> None:
    context = Context(0, 1, 0, torch.device("cpu"), None, tmp_path)
    result = find_job("plan").run(config_of(["job=plan", "cluster.world_size=1024", "seq_len=10000000"]), context)
    assert result is not None and "10,000,000 tokens on 1,024 ranks" in result["report"]
