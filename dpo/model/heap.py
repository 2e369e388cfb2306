"""What the C library does with freed memory while weights are gathered and let go again.

glibc learns from every large block that is freed to serve the next one from its heap. Under ZeRO-3 whole
weights come and go between the shards that stay, so that the heap keeps their holes: a rank on a CPU so came
to hold more than the whole model, of which its tensors were half.
"""

import ctypes

LARGE_BLOCK = 2**20
"""Bytes from which a block is mapped apart, and given back to the system when it is freed."""
_M_MMAP_THRESHOLD = -3  # malloc.h


def return_large_blocks() -> None:
    """From now on this process gives large blocks back when they are freed; without glibc it does nothing.

    A large block then costs a system call and its pages' first touch each time: little beside the collective
    that fills it, and the reason why processes that shard nothing stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
