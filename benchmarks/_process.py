"""What a process does so that nothing of it outlives a call that is killed."""

import ctypes
import signal


def die_with_parent() -> None:
    """SIGKILL for this process when the one that started it is gone; Linux only"""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
