"""What W&B was given of a run, so that nothing is given twice: a line for each row and thing, kept in the run.

A W&B run is a list of rows with rising numbers. A row's number is the training step of what it shows, or a later one
for what came late. Whether rows arrived is for the receiver to say: the server, or the file of an offline client.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pathfm.files import write_text
from pathfm.track.json_lines import JsonLines

Mode = Literal["online", "offline"]
Entry = dict[str, Any]
_IN_ROWS = ("metrics", "tuning", "picture", "all_to")


class Sent:
    """Entries: `{"begun": mode, "folder": ...}` and `{"ended": true}` around a mirror's life; `{"row": N}` with what
    the row shows: `metrics` (its step, with `left_out`, the batches that training left out so far), `tuning`,
    `picture`; or with what is beside the rows: `alarm`, `export`.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonLines(path)
        self._entries: list[Entry] = self._file.read()
        self._recount()

    def begin(self, mode: Mode, folder: str) -> None:
        self._mode = mode
        self._write({"begun": mode, "folder": folder})

    def end(self) -> None:
        self._write({"ended": True})

    def add(self, row: int, shown: Mapping[str, Any]) -> None:
        self._write({"row": row, **({"offline": True} if self._mode == "offline" else {}), **shown})

    def has(self, kind: str, key: str) -> bool:
        return (kind, key) in self._keys

    def keep_as_it_is(self, left_out: int) -> None:
        """The run went back, and W&B keeps what it has of the steps after that."""
        self.add(self.last_row, {"metrics": self.metrics_to, "left_out": left_out})

    def forget_rows_after(self, row: int) -> None:
        """The server went back to `row`."""
        self._keep(lambda entry: not _is_of_rows(entry) or entry["row"] <= row)

    def only_what_the_server_has(self, row: int) -> None:
        """`row`: the last one of the server, -1 for none. What only offline files have counts as not sent."""
        last_known = self.last_row
        self._keep(lambda entry: "row" not in entry or (entry["row"] <= row and _reached_a_server(entry)))
        if row > last_known:  # by a client of another place: what a row shows follows from its number
            self._write({"row": row, "all_to": row})

    def unfinished_folder(self) -> str | None:
        """That of an offline client that did not end by itself, so that its file tells what it wrote."""
        begun = self._last_beginning()
        if begun is None or any("ended" in entry for entry in self._entries[begun:]):
            return None
        return self._entries[begun]["folder"] if self._entries[begun]["begun"] == "offline" else None

    def only_what_was_written(self, rows: set[int]) -> None:
        """By the client of `unfinished_folder`."""
        begun = self._last_beginning()
        lost = {id(entry) for entry in self._entries[begun:] if _is_of_rows(entry) and entry["row"] not in rows}
        self._keep(lambda entry: id(entry) not in lost)

    def row_of(self, step: int) -> int | None:
        """The row of the last metrics up to a training step."""
        rows = [entry["row"] for entry in self._entries if entry.get("metrics", step + 1) <= step]
        return max(rows, default=None)

    def _last_beginning(self) -> int | None:
        return next((n for n in reversed(range(len(self._entries))) if "begun" in self._entries[n]), None)

    def _write(self, entry: Entry) -> None:
        self._file.append(entry)
        self._entries.append(entry)
        self._count(entry)

    def _keep(self, is_kept: Callable[[Entry], bool]) -> None:
        kept = [entry for entry in self._entries if is_kept(entry)]
        if len(kept) < len(self._entries):
            self._entries = kept
            write_text(self._file.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._recount()

    def _recount(self) -> None:
        self.last_row = -1
        self.metrics_to = -1  # the last step whose metrics were sent
        self.all_to = -1  # up to this step, whatever is in rows was sent by someone else
        self.left_out: int | None = None  # batches that training had left out at the last metrics
        self._keys: set[tuple[str, str]] = set()
        for entry in self._entries:
            self._count(entry)

    def _count(self, entry: Entry) -> None:
        if _is_of_rows(entry):
            self.last_row = max(self.last_row, entry["row"])
        if "metrics" in entry:
            self.metrics_to, self.left_out = max(self.metrics_to, entry["metrics"]), entry["left_out"]
        if "all_to" in entry:
            self.all_to = max(self.all_to, entry["all_to"])
            self.metrics_to = max(self.metrics_to, entry["all_to"])
        self._keys |= {(kind, key) for kind in ("tuning", "picture", "alarm", "export") for key in entry.get(kind, ())}


def _is_of_rows(entry: Entry) -> bool:
    return any(kind in entry for kind in _IN_ROWS)


def _reached_a_server(entry: Entry) -> bool:
    """Offline files may have been sent by 'wandb sync': then the server has the rows, and perhaps the rest."""
    return _is_of_rows(entry) or not entry.get("offline")
