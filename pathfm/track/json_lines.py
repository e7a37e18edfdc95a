"""metrics.jsonl: the truth about what was logged, one JSON object a line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathfm.files import write_text


class JsonLines:
    """Appends lines, each written whole; a line that a killed process left half is dropped when the run continues."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values), ensure_ascii=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop lines of steps after `step`, which a resumed run is about to log again."""
        kept = [line for line in self.read() if line["step"] <= step]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the half line of a killed process
        return lines
