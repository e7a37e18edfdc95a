"""Bytes of a file by offset: asked for ahead of the reading where they lie on the disk, at no cost where in memory."""

import os
import sys

_AT_ONCE = getattr(os, "RWF_NOWAIT", 0)  # Linux: read what is in memory, fail rather than wait for the disk
_REQUEST_BYTES = 128 << 10  # Linux cuts a longer request to the device's own read-ahead, which is often this
_BETWEEN_REQUESTS_BYTES = 1 << 20
_FAR_BYTES = 2 << 20  # who jumps over more than this waits longer for all bytes between than for a read of its own
_NEVER = sys.maxsize


class TarBytes:
    """Reads of a growing offset, in whole blocks or in small pieces.

    pread on a descriptor, not mmap: a tar that is cut meanwhile is an error to report, not a SIGBUS.
    """

    def __init__(self, descriptor: int, block_bytes: int, ahead_bytes: int = 8 << 20) -> None:
        self._descriptor = descriptor
        self._ahead_bytes = ahead_bytes
        self._block = memoryview(bytearray(block_bytes))
        self._block_begin = self._block_end = 0
        self._asked_at = self._asked_until = 0
        self._ask_again_at = _NEVER  # until bytes are found not to be in memory

    def block_from(self, offset: int) -> memoryview:
        """The bytes from `offset` on, fewer than a block only at the end of the file; valid until the next block."""
        self._block_begin = self._block_end = offset
        self._block_end += self.fill(self._block, offset)
        return self._block[: self._block_end - offset]

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes, fewer only at the end of the file; those of the present block are not read again."""
        if self._block_begin <= offset and offset + size <= self._block_end:
            at = offset - self._block_begin
            return bytes(self._block[at : at + size])
        content = bytearray(size)
        return bytes(content[: self.fill(content, offset)])

    def fill(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` with the bytes from `offset` on. Returns how many; fewer only at the end of the file."""
        if offset >= self._ask_again_at:
            self._ask_ahead(offset, offset + len(buffer))
        try:
            done = os.preadv(self._descriptor, [buffer], offset, _AT_ONCE)
        except OSError:  # not in memory, or a file system that cannot say so; whatever else is wrong is said below
            done = 0
        if done == len(buffer):
            return done
        if self._ask_again_at == _NEVER:
            self._asked_at = offset
            self._ask_ahead(offset, offset + len(buffer))
        return fill_at(self._descriptor, buffer, offset)

    def _ask_ahead(self, begin: int, end: int) -> None:
        """Have the disk fetch what is read next while we think about what was read."""
        is_near = begin - self._asked_at <= _FAR_BYTES
        self._asked_at, self._ask_again_at = begin, begin + _BETWEEN_REQUESTS_BYTES
        self._asked_until = max(self._asked_until, begin)
        while hasattr(os, "posix_fadvise") and self._asked_until < end + self._ahead_bytes * is_near:
            os.posix_fadvise(self._descriptor, self._asked_until, _REQUEST_BYTES, os.POSIX_FADV_WILLNEED)
            self._asked_until += _REQUEST_BYTES


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`; fewer only at the end of the file."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more  # one pread may return less on a network disk
    return content


def fill_at(descriptor: int, buffer: bytearray | memoryview, offset: int) -> int:
    """Like `read_at`, into a buffer. Returns how many bytes there were."""
    done = 0
    while done < len(buffer) and (more := os.preadv(descriptor, [memoryview(buffer)[done:]], offset + done)):
        done += more
    return done
