"""Ends an embedded Ray with the command that started it, however that ends.

Ray's own processes do not all notice that the process that started them was killed, nor do those that a job
started. So this file runs as a process of its own (it imports nothing but the standard library, and is run by its
path). It waits until its stdin is closed, which the kernel does when the command is gone; then it kills every
process that has the mark in its environment, which all of Ray's processes and their children inherit, or an open
file in Ray's folder (some of Ray's processes overwrite their environment with a title), and removes the folder.
Processes are found in /proc; elsewhere than on Linux Ray's own reaper must do.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "DISTATTN_EMBEDDED_RAY"
"""Name of the environment variable that marks processes; its value tells one embedded Ray from another."""

# Seconds to go on killing: a process may start another one before it is gone.
_PATIENCE = 20.0


def start(token: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start the guard; closing its stdin lets it do its work and end.

    Args:
        token: value of the mark.
        folder: is removed in the end.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, token, str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal does not reach it
    )


def belonging(token: str, folder: str, command: int) -> list[int]:
    """The pids of this user's processes, but the command, that have the mark or a file open in the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != command and (_is_marked(entry, token) or _has_open(entry, folder)):
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found


def _is_marked(entry: Path, token: str) -> bool:
    return f"{MARK}={token}".encode() in (entry / "environ").read_bytes().split(b"\0")


def _has_open(entry: Path, folder: str) -> bool:
    for descriptor in (entry / "fd").iterdir():
        try:
            if os.readlink(descriptor).startswith(f"{folder}/"):
                return True
        except OSError:  # it was closed just now
            continue
    return False


def end_all(token: str, folder: str, command: int) -> None:
    """Kill all that belong to the embedded Ray, until there are none."""
    deadline = time.monotonic() + _PATIENCE
    while (pids := belonging(token, folder, command)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    token, folder = sys.argv[1:]
    command = os.getppid()  # it has files of Ray open too, and may live on
    sys.stdin.buffer.read()
    end_all(token, folder, command)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
