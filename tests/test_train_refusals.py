"""Training: what cannot go on or be trained is refused with a sentence, and what a run follows from is written down."""

import dataclasses
import re
from pathlib import Path

import pytest
from test_train import config_of, curve_of, one_thread, own_run

from distattn import checkpoint
from distattn.conf.schema import TrainConfig
from distattn.errors import ConfigError
from distattn.jobs import train

__all__ = ["one_thread"]  # a fixture, for each test here too

# What changes nothing of a curve's numbers but where they are read, written or begin.
ASIDE = {
    "name", "until", "validate_every", "validate_windows", "log_every", "tensorboard", "save_every", "resume", "export",
    "compile",
}  # fmt: skip


def test_what_a_curve_follows_from_is_in_its_checkpoints() -> None:
    settings = train.settings_of(config_of(), *train.corpora(config_of()))
    named = {name.removeprefix("job.") for name in settings if name.startswith("job.")}
    assert named == {field.name for field in dataclasses.fields(TrainConfig)} - ASIDE


def test_only_the_same_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    own_run(tmp_path, "job.steps=2", "job.warmup=1")
    more = own_run(tmp_path, "job.warmup=1", "model.slice_rows=7", "job.save_every=1")
    assert type(more["error"]) is ConfigError
    assert "is of a run in which job.steps was 2 and is 10; expected the same settings, or another" in str(
        more["error"]
    )
    assert len(curve_of(tmp_path)) == 2


def test_other_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSIONS", {"distattn": "0.0.1", "torch": "1.0"})
        own_run(tmp_path, "job.steps=1", "job.warmup=0")
    said = own_run(tmp_path, "job.steps=1", "job.warmup=0")["lines"]
    assert "was made with {'distattn': '0.0.1', 'torch': '1.0'}, and this is {" in said[0] and len(said) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("job.steps=0", "job.steps is 0; expected at least 1"),
        ("job.accumulate=0", "job.accumulate is 0; expected at least 1"),
        ("job.data_ranks=0", "job.data_ranks is 0; expected at least 1"),
        ("job.log_every=0", "job.log_every is 0; expected at least 1"),
        ("job.documents=true job.batch=2", "job.documents is true, with job.batch=2 and job.curriculum=text; expected"),
        ("job.documents=true attention=hierarchical", "expected a pattern and nothing else, since summaries, chosen"),
        ("job.batch=0", "job.batch is 0; expected at least 1"),
        ("job.until=11", "job.until is 11; expected 1 to job.steps, 10, or null"),
        ("job.curriculum=poems", "job.curriculum is 'poems'; expected one of text, recall"),
        ("job.curriculum=recall", "seq_len is 301; expected at least 400 with job.curriculum=recall"),
        ("job.choice_weight=1", "job.choice_weight is 1.0; expected 0, or job.curriculum=recall and attention that"),
        ("job.choice_weight=-1", "job.choice_weight is -1.0; expected at least 0"),
        ("job.validate_every=5", "job.validate_every is 5, but data.held_out is null; expected a share"),
        ("job.save_every=0", "job.save_every is 0; expected at least 1"),
        ("job.learning_rate=0", "job.learning_rate is 0.0; expected more than 0"),
        ("job.learning_rate=nan", "job.learning_rate is nan; expected more than 0"),
        ("job.warmup=11", "job.warmup is 11; expected 0 to job.steps, 10"),
        ("job.weight_decay=-1", "job.weight_decay is -1.0; expected at least 0"),
        ("job.clip=0", "job.clip is 0.0; expected more than 0, or null"),
        ("job.resume=/nowhere", "job.resume is '/nowhere', which is no folder"),
        ("seed=-1", "seed is -1; expected at least 0"),
        ("model.dtype=float16", "model.dtype is 'float16', whose small gradients would vanish"),
        ("attention.causal=false", "attention=longformer lets a token depend on those that follow it"),
        ("attention=nsa", "attention=nsa has gates or pools that are learned; expected one without for job=train"),
        ("attention.lookahead=true", "attention=hierarchical lets a token depend on those that follow it"),
        ("seq_len=100000000", "seq_len is 100,000,000 bytes"),
    ],
)
def test_what_cannot_be_trained_is_refused(override: str, message: str) -> None:
    overrides = ["attention=hierarchical", override] if "lookahead" in override else override.split()
    with pytest.raises(ConfigError, match=re.escape(message)):
        train.check(config_of(*overrides))


def test_a_window_needs_one_byte_more(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(302))
    train.check(config_of(f"data.path={path}"))
    with pytest.raises(ConfigError, match="seq_len is 302 bytes, all that .* has; expected at least one byte more"):
        train.check(config_of(f"data.path={path}", "seq_len=302"))
