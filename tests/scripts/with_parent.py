"""Runs a command that ends when its parent ends: PARENT COMMAND ARGUMENTS..."""

import ctypes
import os
import signal
import sys


def end_with(parent: int) -> None:
    """Linux kills this process when `parent` ends; elsewhere nothing happens."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:               # it has ended in the meantime
            os._exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execvp(sys.argv[2], sys.argv[2:])
