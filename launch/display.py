"""What a person sees while ranks work: a bar for each rank on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from distattn.jobs import Result

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Progress and lines of text of many ranks, on stdout; use it as a context manager.

    On a terminal there is one bar a rank, for the stage that it is in. Elsewhere rank 0 alone prints its
    progress: a line when a stage is complete, and one every ten seconds while it is not.
    """

    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False, markup=False)
        self._bars: Progress | None = None
        self._tasks: dict[int, tuple[str, TaskID]] = {}
        self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("rank {task.fields[rank]}"),
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[info]}", markup=False),
                console=self._console,
            )

    def __enter__(self) -> "Display":
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def progress(self, rank: int, stage: str, done: float, total: float, info: dict[str, object]) -> None:
        """See `Context.progress`."""
        text = "  ".join(f"{key}={value}" for key, value in info.items())
        if self._bars:
            if rank not in self._tasks:
                self._tasks[rank] = stage, self._bars.add_task(stage, total=total, rank=rank, info=text)
            before, task = self._tasks[rank]
            if stage != before:
                self._tasks[rank] = stage, task
                self._bars.reset(task, description=stage)
            self._bars.update(task, completed=done, total=total, info=text)
        elif rank == 0:
            now = time.monotonic()
            if done >= total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = now
                share = f"{100 * done / total:.0f} %" if total else "done"
                self._print(f"{stage}: {share}  {text}".rstrip())

    def log(self, rank: int, text: str) -> None:
        """Print a line, with its rank in front."""
        self._print(f"[rank {rank}] {text}")

    def _print(self, text: str) -> None:
        if self._bars:
            self._bars.console.print(text)
        else:
            _write_line(text)


class Shown:
    """A reporter in the process that shows; without a display only lines of text are printed."""

    def __init__(self, display: Display | None, rank: int) -> None:
        self._display, self._rank = display, rank

    def progress(self, stage: str, done: float, total: float, info: dict[str, object]) -> None:
        if self._display:
            self._display.progress(self._rank, stage, done, total, info)

    def log(self, text: str) -> None:
        if self._display:
            self._display.log(self._rank, text)
        else:
            _write_line(f"[rank {self._rank}] {text}")


def print_result(result: Result | None) -> int:
    """Print the report that rank 0 returned; return its exit code."""
    result = result or {}
    if result.get("report"):
        print(result["report"], flush=True)
    return int(result.get("exit_code", 0))


def _write_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")  # at once, since print writes the end of the line apart and other ranks may print
    sys.stdout.flush()
