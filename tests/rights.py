"""The rights of an ordinary user, for tests that the superuser runs: it may write into every folder."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3, _OVERRIDE = 0x20080522, 1 << 1 | 1 << 2 | 1 << 3
"""Of capabilities(7): CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER."""


@contextmanager
def ordinary_rights() -> Iterator[None]:
    """Inside, this thread is held to the modes of files and folders, whoever it runs as."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0))
    before = ctypes.create_string_buffer(24)
    assert libc.capget(header, before) == 0
    effective, *others = struct.unpack("6I", before.raw)
    less = ctypes.create_string_buffer(struct.pack("6I", effective & ~_OVERRIDE, *others))
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
