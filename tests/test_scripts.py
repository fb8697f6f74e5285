"""Setting up: what happens before and after the installation itself. And that the measuring scripts load."""

import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
