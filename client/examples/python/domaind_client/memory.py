"""Sealed memfds: what the service hands out, and what a driver makes."""

import fcntl
import mmap
import os

from domaind_client.errors import ProtocolError


class Mapping:
    """Memory behind an fd, in this process. The fd stays the caller's."""

    def __init__(self, memfd: int, size_bytes: int, writable: bool):
        self.stat = os.fstat(memfd)
        self.seals = _seals(memfd)
        # Memory that can shrink, or is too short, would end us with a SIGBUS.
        if not self.seals & fcntl.F_SEAL_SHRINK or self.stat.st_size < size_bytes:
            raise ProtocolError(f"memory that has not {size_bytes} bytes for good")
        self.size_bytes = size_bytes
        self.writable = writable
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._mmap = mmap.mmap(memfd, size_bytes, mmap.MAP_SHARED, protection)
        self._bytes = memoryview(self._mmap)
        self._words = self._bytes.cast("Q")

    def bytes(self, offset: int, length: int) -> memoryview:
        """A part of it, which must have been released before the mapping can be closed."""
        if offset + length > self.size_bytes:
            raise ProtocolError(f"{length} bytes at {offset:#x} of memory of {self.size_bytes}")
        return self._bytes[offset : offset + length]

    @property
    def words(self) -> memoryview:
        """All of it as 64-bit words in native byte order. See README.md on loading them."""
        return self._words

    def close(self) -> None:
        """Unmaps it. Fails with BufferError while somebody still has a part of it: so it never
        goes unnoticed that something derived from it is in use."""
        if not self._mmap.closed:
            self._words.release()
            self._bytes.release()
            self._mmap.close()


class Buffer:
    """A driver's own memory: a memfd that cannot change its size, mapped here."""

    def __init__(self, size_bytes: int, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW):
        self.memfd = os.memfd_create("domaind-python", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, size_bytes)
        fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, seals)
        self.memory = mmap.mmap(self.memfd, size_bytes)

    def close(self) -> None:
        self.memory.close()
        os.close(self.memfd)


def _seals(memfd: int) -> int:
    try:
        return fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError("an fd that is no memfd") from error
