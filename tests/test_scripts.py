"""Setting up: what happens before and after the installation itself. And what the measuring scripts rest on."""

import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rank_pool import RankPool

from distattn.jobs.context import Context

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with all that scripts/setup-env reads."""
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup-env"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def set_up(
    checkout: Path, *arguments: str, cwd: Path = Path("/"), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "scripts" / "setup-env", *arguments],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )


def fake_environment(checkout: Path, stamp: str) -> Path:
    """A .venv whose python runs but has no pip, so that an installation with and into it fails at once."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in "-m pip"* | "-m ensurepip"*) echo no pip here >&2; exit 1;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (checkout / ".venv" / "distattn-installed").write_text(stamp)
    return python


def stamp_of(checkout: Path) -> str:
    text = (checkout / "pyproject.toml").read_bytes() + (checkout / "constraints.txt").read_bytes()
    return f"{checkout} {hashlib.sha256(text).hexdigest()}  -\n"


def test_nothing_is_done_twice(checkout: Path) -> None:
    fake_environment(checkout, stamp_of(checkout))
    done = set_up(checkout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_changed_pins_are_installed_and_a_failure_is_remembered(checkout: Path) -> None:
    python = fake_environment(checkout, stamp_of(checkout))
    with (checkout / "constraints.txt").open("a") as constraints:
        constraints.write("# changed\n")
    done = set_up(checkout, PYTHON=str(python))
    assert done.returncode == 1
    assert "no pip here" in done.stderr and "the installation failed" in done.stderr
    # The next one starts anew, for which it needs a Python.
    done = set_up(checkout, PYTHON="/no/such/python")
    assert done.returncode == 1
    assert "PYTHON=/no/such/python is not a Python 3.11, 3.12 or 3.13" in done.stderr
    assert not python.exists()


def test_uv_looks_where_pip_was_told_to(checkout: Path) -> None:
    python = fake_environment(checkout, "changed")
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '"-m pip config list") echo ":env:.find-links=\'/wheels\'"; echo "global.find-links=\'/other\'"\n'
        "echo \"global.extra-index-url='file:///extra'\"; echo \"global.index-url='https://mirror/simple'\";;\n"
        f'"-m pip"*) ;;\n*) exec {sys.executable} "$@";;\nesac\n'
    )
    uv = python.with_name("uv")
    uv.write_text('#!/bin/sh\necho "$@"\n')
    uv.chmod(0o755)
    (checkout / ".venv" / "distattn-installed").write_text(f"{checkout} of before\n")
    done = set_up(checkout, PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert "--find-links /wheels --default-index https://mirror/simple -e .[plot,dev]" in done.stdout
    assert set_up(checkout).stdout == ""  # it is remembered
    # Another environment, with the same pins, where the caller is.
    done = set_up(checkout, "other", "a.whl", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert f"--python other/bin/python -c {checkout}/constraints.txt --find-links /wheels" in done.stdout
    assert "simple a.whl" in done.stdout and (checkout / "other" / "bin" / "python").exists()


def test_a_missing_python_is_named(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "sha256sum", "rm", "env"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    (tools / "python3").symlink_to("/bin/false")  # such as a shim that has no version to run
    done = set_up(checkout, PATH=str(tools), PYTHON="")
    assert done.returncode == 1
    assert "found no Python 3.11, 3.12 or 3.13 with the venv module" in done.stderr


SHARED = ("measuring", "contending", "peers", "recorded", "sharded")  # what scripts share
SCRIPTS = [path for path in sorted((ROOT / "scripts").glob("*.py")) if path.stem not in SHARED]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_measuring_scripts_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(path.parent)  # as Python does for a script
    if path.stem == "compile_kernels":
        pytest.importorskip("triton")
    assert callable(runpy.run_path(str(path))["main"])  # main is not called: the name is not "__main__"


def peers_errors(context: Context) -> dict[str, float]:
    """On a rank: the errors of peers that run on CPUs, against the oracle."""
    import torch
    from sharded import Data

    from distattn import reference
    from distattn.patterns import Causal, GlobalKeys, GlobalTokens, SlidingWindow

    import peers  # isort: skip

    assert context.mesh is not None
    dense = peers.Problem(96, 4, 2, None, 0, 0, False, context.mesh, context.device)
    window = dense._replace(before=9, globals_=3)
    two_sided = window._replace(after=9, global_queries=True)
    near = Causal() & (SlidingWindow(9, 0) | GlobalKeys(range(3)))
    data = Data(96, 4, 2, 16, torch.float32, context.device)
    q, k, v, grad = (data.rows(kind, ((0, 96),)).requires_grad_() for kind in Data.KINDS)
    errors = {}
    for make, problem, pattern in (
        (peers.ulysses, dense, Causal()),
        (peers.flex_after_gather, window, near),
        (peers.flex_after_gather, two_sided, SlidingWindow(9, 9) | GlobalTokens(range(3))),
    ):
        contender = make(problem)
        ((first, stop),) = contender.segments
        mine = [data.rows(kind, contender.segments).requires_grad_() for kind in ("q", "k", "v")]
        expected, _ = reference.attention(q, k, v, pattern)
        if make is peers.ulysses:  # FlexAttention has no backward pass on CPUs
            out = contender.attend(*mine)
            found = torch.autograd.grad(out, mine, data.rows("grad", contender.segments))
            wanted = torch.autograd.grad(expected, (q, k, v), grad.double())
            for name, x, y in zip(("dq", "dk", "dv"), found, wanted, strict=True):
                errors[f"{contender.name} {name}"] = reference.max_error(x, y[:, first:stop])
        with torch.no_grad():
            errors[f"{contender.name} {pattern}"] = reference.max_error(
                contender.attend(*mine), expected[:, first:stop]
            )
    return errors


def recorded_step(context: Context, schedule: str) -> tuple[bool, int, int]:
    """On a rank: whether a step without journeys gives what one with them gives, and the bytes that each sent."""
    import torch
    from recorded import Recorded
    from sharded import Data

    import distattn
    from distattn import presets
    from distattn.operators import sent

    same, sizes = True, [0, 0]
    for spec in (presets.dense(), presets.hierarchical(32, (16, 64), (2,), 3, global_keys=(70,))):
        plan = distattn.make_plan(
            spec, 320, heads=4, kv_heads=2, head_dim=16, mesh=context.mesh, schedule=schedule, block_q=16, block_k=16
        )
        data = Data(320, 4, 2, 16, torch.float32, context.device)
        q, k, v, grad = (data.rows(kind, plan.segments).requires_grad_() for kind in Data.KINDS)
        recorded, results = Recorded(), []
        for number, around in enumerate((recorded.recording, recorded.delivered)):
            before = sent.total
            with around():
                out = distattn.attend(q, k, v, plan)
                results.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
            sizes[number] += sent.total - before
        same &= all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return same, sizes[0], sizes[1]


def with_scripts(context: Context, name: str, *arguments: str) -> object:
    """On a rank: a function of this module that imports what scripts share."""
    sys.path.insert(0, str(ROOT / "scripts"))  # as Python does for a script
    try:
        return globals()[name](context, *arguments)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_peers_compute_what_ours_is_measured_at(ranks: RankPool) -> None:
    for errors in ranks(2, with_scripts, "peers_errors"):
        assert len(errors) == 6
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("schedule", ("direct", "ring"))
def test_a_step_without_journeys_is_the_same_but_for_them(ranks: RankPool, schedule: str) -> None:
    for same, sent, sent_again in ranks(2, with_scripts, "recorded_step", schedule):
        assert same
        assert sent > 0
        assert sent_again == 0


@pytest.mark.full
def test_training_goes_through_both_legs(tmp_path: Path) -> None:
    tiny = ["seq_len=512", "job.batch=1", "job.steps=4", "job.until=2", "job.warmup=1", "job.validate_windows=1"]
    sizes = ["model.width=16", "model.hidden=16", "model.head_dim=16", "model.dtype=float32", "launcher.num_workers=1"]
    command = [ROOT / "scripts" / "train_needle", tmp_path / "run", *tiny, *sizes]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"training resumes after step 2, from {tmp_path}/run/start/checkpoints/step-00000002" in done.stdout
    assert (tmp_path / "run" / "needle.safetensors").exists()
    wrong = subprocess.run(command[:1], capture_output=True, text=True)
    assert wrong.returncode != 0 and "usage: scripts/train_needle FOLDER [overrides]" in wrong.stderr
