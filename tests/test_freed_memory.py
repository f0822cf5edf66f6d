"""Memory that is freed and kept: the next message of a megabyte costs no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
if sys.argv[1] == "keep":
    from bbopd.rpc.freed_memory import keep_freed_memory
    assert keep_freed_memory()
def faults(messages):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for number in range(messages):
        bytes(bytearray(2**21 + 4096 * number))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(50)
print(faults(50))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_of_large_messages_is_used_again() -> None:
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "give back")
    )
    assert kept < 1000 < 10_000 < given_back
