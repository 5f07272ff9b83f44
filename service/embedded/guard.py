"""Runs the embedded engine for the service, and ends the engine when the service ends.

The guard is a program of its own, with the engine's command line as arguments. It ends the engine when the
guard's standard input closes: the service closes it, or the kernel does so when the service is killed. The
guard imports only the standard library, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading

STOP_TIMEOUT_S = 8.0
# The signal that ends the engine at once. It syncs at every commit, so nothing acknowledged is lost.
# Windows has no such signal, and runs no engine.
KILL = getattr(signal, "SIGQUIT", signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


def main(command: list[str], lock_fd: int) -> int:
    """Run the engine until it ends or the standard input closes; return the engine's exit code.

    The engine inherits the open lock of its data directory, so the lock is held until the engine has ended.
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
    """Ask Linux to end the engine if this guard is killed."""
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
