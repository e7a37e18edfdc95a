"""Which rows are in the file that the W&B client writes when it is offline, so that none is written twice or lost.

The client keeps rows in memory for seconds before it writes them; those of a process that was killed are gone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MAGIC = b":W&B\xe1\xbe\x00"  # with the version, 0
_HEADER_BYTES = 7  # of the file, and of every piece: checksum (4), length (2), kind (1)
_BLOCK_BYTES = 32_768
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def rows_in(folder: Path) -> set[int] | None:
    """The W&B steps of the rows that a client wrote in its folder; None where they cannot be told."""
    try:
        return {
            record.history.step.num
            for file in folder.glob("run-*.wandb")
            for record in records_of(file)
            if record.WhichOneof("record_type") == "history"
        }
    except Exception:  # a client of another version, with another format
        return None


def records_of(file: Path) -> Iterator[Any]:
    """What was written, one protobuf message each; a torn end is left out. Raises `ValueError` for other formats."""
    from wandb.proto.wandb_internal_pb2 import Record

    for message in _messages(file.read_bytes()):
        record = Record()
        record.ParseFromString(message)
        yield record


def _messages(content: bytes) -> Iterator[bytes]:
    """The messages of a LevelDB log: blocks of 32 KiB that hold pieces of messages. No piece's head is cut."""
    if content and not content.startswith(_MAGIC):
        raise ValueError("this is a file of another format")
    position, parts = _HEADER_BYTES, b""
    while position + _HEADER_BYTES <= len(content):
        if (left := _BLOCK_BYTES - position % _BLOCK_BYTES) < _HEADER_BYTES:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        piece = content[position + _HEADER_BYTES : position + _HEADER_BYTES + length]
        if len(piece) < length or kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
            return
        parts = piece if kind in (_WHOLE, _FIRST) else parts + piece
        if kind in (_WHOLE, _LAST):
            yield parts
        position += _HEADER_BYTES + length
