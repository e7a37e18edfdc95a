"""What a process does with memory that it no longer needs."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for what is allocated next. Returns whether it can (glibc alone does).

    By itself it gives large pieces back at once, and the kernel must clear every page when the next step asks for them
    again (benchmarks/results/step.md). Pieces of 32 MiB and more are always given back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**28}
    return {mallopt(option, value) for option, value in settings.items()} == {1}
