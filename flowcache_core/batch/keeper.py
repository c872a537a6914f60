"""Starts a server, and ends it when whoever started this is gone: `python keeper.py LOG COMMAND…`.

Whoever that is holds the other end of the standard input, which the system closes with it. Should this process be
killed itself, as Ray does with what a lost worker leaves, Linux ends the server. Run as a file, so that it needs
nothing but Python.
"""

import ctypes
import signal
import subprocess
import sys
import threading

GRACE = 5.0  # seconds to end in


PR_SET_PDEATHSIG = 1  # of Linux's prctl


def _end_with_keeper() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    log, *command = sys.argv[1:]
    before = _end_with_keeper if sys.platform == "linux" else None
    with open(log, "w") as out:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, preexec_fn=before
        )

    def wait() -> None:
        sys.stdin.buffer.read()
        server.terminate()
        try:
            server.wait(GRACE)
        except subprocess.TimeoutExpired:
            server.kill()

    threading.Thread(target=wait, daemon=True).start()
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
