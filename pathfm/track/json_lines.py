"""metrics.jsonl: the truth about what was logged, one JSON object a line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathfm.files import flush_to_disk, write_text
from pathfm.log import get_logger

_log = get_logger(__name__)


class JsonLines:
    """Appends lines. What a full disk does not take is kept and written with the next line that it takes.

    A line that a killed process left half is dropped when the file is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = ""

    def append(self, values: Mapping[str, Any]) -> None:
        self._waiting += json.dumps(dict(values)) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(self._separator() + self._waiting.encode())
        except OSError as error:
            _log.warning("%s could not be written (%s); its lines are kept and written later", self.path.name, error)
        else:
            self._waiting = ""

    def flush(self) -> None:
        """Ask the disk to keep what was appended."""
        if self.path.is_file():
            flush_to_disk(self.path)

    def forget_after(self, step: int) -> None:
        """Drop lines of steps after `step`, which a resumed run is about to log again."""
        kept = [line for line in self.read() if line["step"] <= step]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # the half line of a killed process, or the empty one at the end
        return lines

    def _separator(self) -> bytes:
        """A line break when the file ends in the middle of a line."""
        if not self.path.is_file() or not (size := self.path.stat().st_size):
            return b""
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return b"" if file.read(1) == b"\n" else b"\n"
