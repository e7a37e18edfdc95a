"""Tables as text: columns as wide as their widest cell, whole numbers to the right with commas; amounts of bytes."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]], indent: str = "  ") -> str:
    """One line for the header and one for each row; a column of whole numbers stands to the right."""
    to_the_right = [bool(rows) and all(isinstance(row[column], int) for row in rows) for column in range(len(header))]
    texts = [list(header), *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    return "\n".join(indent + _line(row, widths, to_the_right) for row in texts)


def amount(num_bytes: int) -> str:
    """Three digits and a unit."""
    size, units = float(num_bytes), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.{0 if size >= 99.95 or unit == 'bytes' else 1}f} {unit}"


def _line(cells: Sequence[str], widths: Sequence[int], to_the_right: Sequence[bool]) -> str:
    aligned = (
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, to_the_right, strict=True)
    )
    return "  ".join(aligned).rstrip()
