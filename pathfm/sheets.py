"""Pictures side by side on grey paper, with captions: what previews and contact sheets are made of."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 6  # pixels between pictures
GROUP_GAP = 18  # between groups of pictures
_CAPTION_HEIGHT = 18
_PAPER, _INK = (228, 228, 228), (70, 70, 70)  # not white, which is what an empty slide looks like


def paper(width: int, height: int) -> Image.Image:
    """An empty sheet."""
    return Image.new("RGB", (width, height), _PAPER)


def in_columns(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = paper(columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * (width + GAP), index // columns * (height + GAP)))
    return sheet


def captioned(groups: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Groups side by side, each under its caption, which may be cut at the group's width."""
    width = sum(sheet.width for _, sheet in groups) + GROUP_GAP * (len(groups) - 1)
    row = paper(width, _CAPTION_HEIGHT + max(sheet.height for _, sheet in groups))
    left = 0
    for caption, sheet in groups:
        row.paste(_written(caption, sheet.width), (left, 0))
        row.paste(sheet, (left, _CAPTION_HEIGHT))
        left += sheet.width + GROUP_GAP
    return row


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows below each other, with a margin around them all."""
    width = max(row.width for row in rows)
    picture = paper(width + 2 * GAP, sum(row.height + GAP for row in rows) + GAP)
    top = GAP
    for row in rows:
        picture.paste(row, (GAP, top))
        top += row.height + GAP
    return picture


def _written(caption: str, width: int) -> Image.Image:
    strip = paper(width, _CAPTION_HEIGHT)
    ImageDraw.Draw(strip).text((0, 2), caption, fill=_INK, font=ImageFont.load_default(12))
    return strip
