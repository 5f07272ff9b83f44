"""Stands between the service and the embedded engine, so that neither outlives what started it.

Run as a program of its own, with the engine's command line as arguments. It ends the engine when its
standard input closes, which happens when the service closes it and also when the service is killed,
for the kernel closes it then. It imports nothing but the standard library, so it starts at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading

STOP_TIMEOUT_S = 8.0
# Has the engine end at once. It syncs at every commit, so nothing acknowledged is lost by this.
KILL = signal.SIGQUIT
_PR_SET_PDEATHSIG = 1


def main(command: list[str], lock_fd: int) -> int:
    """Run the engine until it ends or our input closes; return its exit code.

    The engine inherits the open lock of its data directory, so the lock is free only when it is gone.
    """
    engine = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=(lock_fd,),
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509  (no threads yet)
    )
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, lambda *_: _stop(engine))
    signal.signal(KILL, lambda *_: engine.kill())
    threading.Thread(target=_stop_at_end_of_input, args=(engine,), daemon=True).start()
    return engine.wait()


def _die_with_parent() -> None:
    """Have Linux end the engine even when this guard is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop_at_end_of_input(engine: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1):
        pass
    _stop(engine)
    try:
        engine.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        engine.kill()


def _stop(engine: subprocess.Popen[bytes]) -> None:
    if engine.poll() is None:
        engine.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], int(sys.argv[1])))
