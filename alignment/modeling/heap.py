"""On a CPU: what one pass frees is kept for the next.

glibc hands every large tensor that is freed back to the kernel, and gets the next one from there, a
page at a time, each zeroed: docs/decisions/0021-freed-memory-is-kept.md.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Have the process keep what it frees, from now on, for what it allocates next.

    Its resident memory does not go down again. Its peak may rise by what does not fit the holes
    that were left; training's was measured to stay as it was.

    Returns:
        whether that is so: elsewhere than with glibc there is nothing to set, and what the
        environment says of malloc has precedence.
    """
    asked = any(name.startswith(_USERS_OWN) for name in os.environ)
    if sys.platform != "linux" or asked or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    # No tensor in a mapping of its own, and nothing off the top of the heap.
    return bool(set_option(_M_MMAP_MAX, 0)) and bool(set_option(_M_TRIM_THRESHOLD, -1))
