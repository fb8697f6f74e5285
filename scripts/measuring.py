"""What the measuring scripts share: arguments, where something was measured, and how rows are written."""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least 1")
    return int(text)


def in_a_folder(text: str) -> Path:
    """An argument that is a file, which need not exist, in a folder that does."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder")
    return path


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where rows go, and what they are of."""
    parser.add_argument("--csv", type=in_a_folder, help="where to write the rows")
    parser.add_argument("--commit", help="what is measured, where git does not tell")


def here(commit: str | None) -> dict[str, object]:
    """Where this was measured: GPU or CPU, versions, commit."""
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    if commit is None:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
    }


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """As CSV, with the columns of all rows."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """What `write_rows` wrote; nothing where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def synchronize(device: torch.device) -> None:
    """Returns when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_of_peak(device: torch.device) -> int:
    """Bytes that are allocated now; from here on `peak_since` counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_since(before: int, device: torch.device) -> float:
    """MiB, 0 where nobody counts."""
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else 0.0
