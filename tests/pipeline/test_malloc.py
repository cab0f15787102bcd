"""A process that keeps what it frees gets it again without a page fault; one process each."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own")

ROUNDS = """
import ctypes, resource
from pipeline.run import malloc

if {keep}:
    print(malloc.keep_freed_memory())
blocks, size = 4, 16 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [libc.malloc(size) for _ in range(blocks)]
    for pointer in held:
        ctypes.memset(pointer, 1, size)
    for pointer in held:
        libc.free(pointer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*, keep, **environment):
    """Lines of a fresh process: the answer, if it was asked, and the page faults of a last pass."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ROUNDS.format(keep=keep)]
    env = {**clean, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_what_is_freed_is_there_in_the_next_pass():
    answer, faults = run(keep=True)
    assert answer == "True"
    assert int(faults) < 100
    (without,) = run(keep=False)
    assert int(without) > 1000, "glibc gives back nothing here anyway"


def test_what_the_environment_says_stands():
    answer, faults = run(keep=True, MALLOC_TRIM_THRESHOLD_="65536")
    assert answer == "False"
    assert int(faults) > 1000
