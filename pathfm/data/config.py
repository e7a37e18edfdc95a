"""Settings of the data layer: recipe group `data`."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from pathfm.config import Section

MAX_NEIGHBOURS = 256  # a hole of a few megabytes in a tar is no reason to stop a run that is to skip what is damaged
MAX_PIXELS = 8192 * 8192  # an image that claims more is taken for a decompression bomb; a 4096 px region has a quarter


@dataclass(frozen=True)
class CorruptPolicy:
    """What to do about samples that cannot be decoded: skip them, stop at the first, or stop at too many."""

    kind: Literal["skip", "raise", "limit"]
    max_fraction: float = 0.0  # of the samples seen; for limit

    _JUDGED_FROM = 1000  # samples: a single bad one among the first few is no large fraction yet

    @classmethod
    def parse(cls, text: str) -> "CorruptPolicy":
        """Read 'skip', 'raise' or 'limit:FRACTION'. Raises ValueError."""
        if text == "skip":
            return cls("skip")
        if text == "raise":
            return cls("raise")
        kind, _, fraction = text.partition(":")
        try:
            if kind == "limit" and 0 < float(fraction) < 1:
                return cls("limit", float(fraction))
        except ValueError:
            pass
        raise ValueError(f"must be skip, raise or limit:FRACTION (limit:0.001, say), not '{text}'")

    def __str__(self) -> str:
        return f"limit:{self.max_fraction:g}" if self.kind == "limit" else self.kind

    def is_broken_by(self, num_skipped: int, num_seen: int) -> bool:
        """Whether so many undecodable samples are too many."""
        if self.kind != "limit":
            return self.kind == "raise" and num_skipped > 0
        return num_skipped > self.max_fraction * max(num_seen, self._JUDGED_FROM)


class DataConfig(Section):
    """How samples are read."""

    corrupt_samples: str = "skip"  # skip | raise | limit:FRACTION of the samples that the run has seen
    max_neighbours: int = Field(MAX_NEIGHBOURS, ge=0)  # rows tried in place of one that cannot be decoded
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=178_956_970)  # Pillow itself refuses more (2 x MAX_IMAGE_PIXELS)
    # below: speed only
    prefetch_batches: int = Field(2, ge=1)  # per worker

    @field_validator("corrupt_samples")
    @classmethod
    def _known_policy(cls, text: str) -> str:
        CorruptPolicy.parse(text)
        return text
