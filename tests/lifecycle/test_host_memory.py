"""Freed memory is there again without the kernel's help."""

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from pathfm.lifecycle.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use():
    pieces = [bytearray(24 * 2**20) for _ in range(8)]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
def test_memory_that_was_used_and_freed_is_used_again_without_page_faults() -> None:
    def faults(how: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout
        )

    pages = 8 * 24 * 2**20 // resource.getpagesize()
    assert faults("kept") < pages // 10 < faults("given back")
