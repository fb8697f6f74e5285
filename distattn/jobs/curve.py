"""train.csv: what each step of a training run measured, and no step twice, however often the run was resumed."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        step: counted from 1.
        loss: what the step makes less, in nats, before its update.
        bits_per_byte: of the text; answers do not count.
        answer_bits: a byte of the answers; None without any.
        chosen: share of the chunks with what is asked for that are chosen; None where no choice is taught.
        held_out_bits: a byte of held-out text, after the update; None where it was not read.
        learning_rate: of this step.
        gradient_norm: over all parameters, before clipping.
        mfu: share of the devices' bfloat16 FLOP/s that the model's take; None where these are not known.
        tokens_per_second: of all ranks together.
    """

    step: int
    loss: float
    bits_per_byte: float
    answer_bits: float | None
    chosen: float | None
    held_out_bits: float | None
    learning_rate: float
    gradient_norm: float
    mfu: float | None
    tokens_per_second: float


def board(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's files, whose later rows than `step` are cut; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)


COLUMNS = tuple(one.name for one in fields(Row))


def read(path: Path) -> list[Row]:
    """All rows up to the first that is not whole, which a killed run may leave as its last; none without a file."""
    if not path.exists():
        return []
    rows = []
    with open(path, newline="") as file:
        for values in list(csv.reader(file))[1:]:
            try:
                step, *numbers = values
                rows.append(Row(int(step), *(float(x) if x else None for x in numbers)))  # type: ignore[arg-type]
            except (TypeError, ValueError):
                break
    return rows


class Curve:
    """The file, open at its end; use it as a context manager.

    Args:
        path: of the file; made if it does not exist.
        step: rows of later steps, by a run that went on without a checkpoint, are cut.
        board: a writer of TensorBoard's, which gets every number too; None: none.
    """

    def __init__(self, path: Path, step: int, board: Any = None) -> None:
        self._board = board
        kept = [row for row in read(path) if row.step <= step]
        aside = path.with_name(f"{path.name}.tmp")
        with open(aside, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *map(astuple, kept)])
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        self._file = open(path, "a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def __enter__(self) -> Curve:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._writer.writerow(astuple(row))
            if self._board is not None:
                for name, value in asdict(row).items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, row.step)
        self._file.flush()

    def flush(self) -> None:
        """Returns when all rows are on the disk: before a checkpoint that stands for them."""
        os.fsync(self._file.fileno())
