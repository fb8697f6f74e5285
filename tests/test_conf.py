"""Every configuration file makes something that works, and what cannot work is refused in one sentence."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import distattn
from distattn import presets
from distattn.conf import schema
from distattn.errors import ConfigError
from distattn.jobs import JOBS, find_job
from distattn.jobs.settings import attention_spec, check, check_ranks
from distattn.launch import local, run
from distattn.layout import LAYOUTS
from distattn.patterns import Causal, GlobalTokens, SlidingWindow

CONF = Path(distattn.__file__).parent / "conf"
ATTENTION = sorted(path.stem for path in (CONF / "attention").glob("*.yaml"))


def config_of(*overrides: str) -> schema.Config:
    schema.register()
    with initialize_config_module("distattn.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*overrides, "output_dir=unused"]))
    assert isinstance(config, schema.Config)
    return config


def names(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}


def test_the_default_is_the_demo() -> None:
    config = config_of()
    check(config)
    assert config.seq_len == 1_048_576
    assert isinstance(config.job, schema.PrefillConfig) and config.job.name == "prefill"
    assert isinstance(config.launcher, schema.LocalConfig)
    spec = attention_spec(config)
    assert [level.chunk for level in spec.summaries] == [64, 1024] and spec.select is not None
    window = Causal() & (SlidingWindow(1023, 0) | GlobalTokens(range(16)))
    assert attention_spec(config_of("attention=window_global")).tokens == window


@pytest.mark.parametrize("name", ATTENTION)
def test_each_attention_file_makes_a_spec(name: str) -> None:
    config = config_of(f"attention={name}", "seq_len=100000")
    check(config)
    assert config.attention["name"] in presets.PRESETS


def test_each_preset_layout_and_job_has_its_file() -> None:
    assert names("attention") == {*presets.PRESETS, "window_global", "tiny_needle"}
    assert names("layout") == {*LAYOUTS, "auto"}
    assert names("job") == {*JOBS, "custom"}
    for name in names("layout"):
        assert config_of(f"layout={name}").layout == schema.LayoutConfig(name, "auto", 128, 128)
    for name in names("job") - {"custom"}:
        assert config_of(f"job={name}").job.name == name


def test_experiments_agree_on_the_decoder_and_its_attention() -> None:
    assert names("experiment") == {"demo", "needle", "tiny_needle", "tiny_needle_start"}
    needle, demo = config_of("experiment=needle"), config_of("experiment=demo", "seq_len=4096")
    assert (demo.attention, demo.model, demo.data) == (needle.attention, needle.model, needle.data)
    assert isinstance(demo.job, schema.NeedleConfig) and demo.job.lengths == [4096]
    first, second = config_of("experiment=tiny_needle_start"), config_of("experiment=tiny_needle", "job.resume=start")
    assert isinstance(first.job, schema.TrainConfig) and isinstance(second.job, schema.TrainConfig)
    assert second.attention == needle.attention and first.attention["name"] == "dense"
    same = {"dtype": "float32", "slice_rows": 4096}
    assert dataclasses.replace(first.model, **same) == dataclasses.replace(second.model, **same) == needle.model
    assert first.job.steps == second.job.steps and first.job.until is not None
    assert (first.seq_len, second.seq_len) == (8192, 65_536)
    # What is said on the command line counts.
    assert config_of("experiment=tiny_needle", "job.resume=start", "seq_len=1024").seq_len == 1024


def test_models_have_the_fields_of_the_decoder() -> None:
    from distattn.model import ModelConfig

    for name in names("model"):
        model = dataclasses.asdict(config_of(f"model={name}").model)
        layers = [model.pop(name) for name in ("dense_layers", "window_layers", "window")]
        assert layers == ([[], [0, 1, 3], 256] if name == "tiny_needle" else [[], [], 512])
        decoder = ModelConfig(**model)
        if name == "tiny":
            assert (decoder.layers, decoder.width, decoder.heads, decoder.head_dim) == (2, 256, 4, 64)


@pytest.mark.parametrize(("length", "part", "expected"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (0, 4, [])])
def test_equal_parts(length: int, part: int, expected: list[int]) -> None:
    assert schema.equal_parts(length, part) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention=mistral", "attention.window=-1"], "attention=mistral: window is -1; expected"),
        (["attention.name=nope"], "attention.name is 'nope'; expected one of dense, mistral"),
        (["+attention.sinks=4"], "attention does not fit the preset 'hierarchical'.*'sinks'"),
        (["attention.window=100"], r"attention=hierarchical: window is 100; expected a multiple of chunks\[0\], 64"),
        (["attention=bigbird", "attention.block=large"], "attention=bigbird: block is 'large'"),
        (["layout.head_ranks=0"], "layout.head_ranks is 0; expected more than 0"),
        (["layout.head_ranks=2"], "layout.head_ranks is 2; expected 1, since the spec has summaries"),
        (["layout.head_ranks=3", "attention=mistral"], "layout.head_ranks is 3; expected a divisor of heads, 4"),
        (["model.heads=5"], "model.heads is 5; expected a multiple of model.kv_heads, 2"),
        (["model.head_dim=0"], "model.head_dim is 0; expected more than 0"),
        (["model.dense_layers=[2]"], "model.dense_layers has 2; expected a layer from 0 to 1"),
        (["model.window_layers=[-1]"], "model.window_layers has -1; expected a layer from 0 to 1"),
        (
            ["model.dense_layers=[0,1]", "model.window_layers=[1]"],
            "model.dense_layers and model.window_layers both have 1",
        ),
        (["model.window=0"], "model.window is 0; expected at least 1"),
        (["launcher.max_restarts=-1"], "launcher.max_restarts is -1; expected at least 0"),
        (["seq_len=0"], "seq_len is 0; expected more than 0"),
        (["data=path", "data.path=/no/such/file"], "data.path is '/no/such/file', which does not exist"),
    ],
)
def test_what_cannot_work_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config_of(*overrides))


def test_ranks_without_work_are_refused() -> None:
    config = config_of("seq_len=1000")
    check_ranks(config, 8)
    with pytest.raises(ConfigError, match="9 ranks are too many for seq_len=1000, which has 8 tiles of 128"):
        check_ranks(config, 9)
    with pytest.raises(ConfigError, match="cluster.world_size is 0"):
        check_ranks(config, 0)
    with pytest.raises(ConfigError, match="layout.head_ranks is 2; expected a divisor of the number of ranks, 3"):
        check_ranks(config_of("seq_len=1000", "layout.head_ranks=2"), 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "'nope'; expected one of generate, needle, plan, prefill, train, verify, or module:function"),
        ("no_such_module:run", "there is no module 'no_such_module'"),
        ("math:no_such_function", "math has no function 'no_such_function'"),
    ],
)
def test_unknown_jobs_are_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_job(name)


def test_an_import_error_inside_a_job_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking_job.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        find_job("lacking_job:run")


# The command, in this process: none of these may start another


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """command(overrides) -> exit code, stdout, stderr."""

    def call(*overrides: str) -> tuple[object, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["distattn", "hydra/job_logging=none", *overrides])
        monkeypatch.setattr(local, "Processes", None)
        with pytest.raises(SystemExit) as end:
            run.main()
        return end.value.code, *capfd.readouterr()

    return call


PAPER_JOB = """
from distattn.errors import ConfigError
ON_PAPER = True
def check(config):
    if config.seed < 0:
        raise ConfigError(f"seed is {config.seed}; expected at least 0")
def run(config, context):
    context.log("working")
    if config.seed == 7:
        raise RuntimeError("unlucky")
    return {"report": f"{config.cluster.world_size} ranks, {context.output_dir}", "exit_code": config.seed}
"""


@pytest.fixture
def paper_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "paper_job.py").write_text(PAPER_JOB)
    monkeypatch.syspath_prepend(tmp_path)
    return ["job=custom", "job.name=paper_job:run", "output_dir=out"]


def test_a_job_on_paper(command: Callable[..., tuple[object, str, str]], paper_job: list[str], tmp_path: Path) -> None:
    code, out, err = command(*paper_job, "cluster.world_size=1024")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["[rank 0] working", f"1024 ranks, {tmp_path / 'out'}"]
    assert command(*paper_job, "seed=3")[0] == 3


def test_a_job_that_breaks_is_not_a_bad_configuration(
    command: Callable[..., tuple[object, str, str]], paper_job: list[str]
) -> None:
    code, _, err = command(*paper_job, "seed=7")
    assert code == 1
    assert err.splitlines()[-1] == "RuntimeError: unlucky"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["seed=-1"], "seed is -1; expected at least 0"),
        (["attention=mistral", "attention.window=-1"], "attention=mistral: window is -1; expected"),
        (["data=path"], "data.path has no value; give it one, as in data.path=..."),
    ],
)
def test_one_sentence_and_exit_code_2(
    command: Callable[..., tuple[object, str, str]],
    paper_job: list[str],
    overrides: list[str],
    sentence: str,
) -> None:
    code, out, err = command(*paper_job, *overrides)
    assert (code, out) == (2, "")
    assert err.startswith(f"distattn: {sentence}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["launcher=torchrun"], "launcher=torchrun needs RANK, "),
        (["launcher.num_workers=0"], "launcher.num_workers is 0; expected 1 to"),
        (["launcher.device=tpu"], "launcher.device is 'tpu'; expected auto, cpu or cuda"),
        (
            ["launcher.device=cpu", "launcher.num_workers=5000"],
            "launcher.num_workers is 5000; expected 1 to",
        ),
        (["cluster.world_size=8"], "cluster.world_size is 8, which is for job=plan only"),
        (
            ["launcher.num_workers=2", "seq_len=100", "launcher.device=cpu"],
            "2 ranks are too many for seq_len=100",
        ),
    ],
)
def test_impossible_launches(
    command: Callable[..., tuple[object, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    sentence: str,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    code, out, err = command("job=custom", "job.name=trial_jobs:total", *overrides)
    assert (code, out) == (2, "")
    assert err.startswith(f"distattn: {sentence}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seq_lne=5", "Could not override 'seq_lne'"),
        ("seq_len=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("attention.widnow=5", "Could not override 'attention.widnow'"),
        ("attention=mitsral", "Could not find 'attention/mitsral'"),
        ("launcher", "requires a value|missing EQUAL|mismatched input"),
    ],
)
def test_hydra_explains_a_wrong_override(
    command: Callable[..., tuple[object, str, str]], override: str, said: str
) -> None:
    code, _, err = command(override)
    assert code == 2
    assert re.search(said, err)
    assert "Traceback" not in err
