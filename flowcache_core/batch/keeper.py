"""Starts a server, and ends it when whoever started this is gone: `python keeper.py LOG COMMAND…`.

Whoever that is holds the other end of the standard input, which the system closes with it. Run as a file, so that it
needs nothing but Python.
"""

import subprocess
import sys
import threading

GRACE = 5.0  # seconds to end in


def main() -> int:
    log, *command = sys.argv[1:]
    with open(log, "w") as out:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)

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
