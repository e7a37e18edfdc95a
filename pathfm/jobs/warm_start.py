"""The beginning of a run from weights that were trained before: what is taken up, what stays as it is."""

from pathfm.errors import UserError
from pathfm.files import sha256, write_json
from pathfm.jobs.named_weights import named_weights
from pathfm.lifecycle.run import Run
from pathfm.log import get_logger
from pathfm.models.pretrained import read_backbone, weights_file
from pathfm.models.vit import ViT
from pathfm.models.warm_start import warm_start
from pathfm.recipe import Recipe
from pathfm.ssl.method import Method
from pathfm.ssl.teacher import start_as_copy

_log = get_logger(__name__)


def start_from_weights(method: Method, recipe: Recipe, run: Run, *, first: bool) -> None:
    """Fill both backbones; the heads begin anew. Rank 0 keeps in `warm_start.json` what was loaded from where.

    Raises `UserError` for a file that does not fit.
    """
    assert recipe.student.pretrained_weights is not None
    named = named_weights(recipe.student.pretrained_weights).path
    if named is None:
        raise UserError("student.pretrained_weights takes a file or a run; without it, weights are random anyway")
    path = weights_file(named)
    found = read_backbone(path)
    report = warm_start(method.student.backbone, found.weights, recipe.student.pretrained_allow, str(path))
    start_as_copy(method.teacher, method.student)
    if first:
        _log.info("warm start from %s: %s", path, report.in_words())
        facts = {"file": str(path.absolute()), "sha256": sha256(path), "left_out": found.others, **report.as_json()}
        write_json(run.directory / "warm_start.json", facts)


def freeze_blocks(backbone: ViT, number: int) -> None:
    """The first blocks and what makes tokens of patches are not trained; mask token and registers still are.

    Raises `UserError` when nothing would be left to train.
    """
    if not number:
        return
    if number >= len(backbone.blocks):
        raise UserError(
            f"student.freeze_blocks={number} leaves none of {len(backbone.blocks)} blocks to train; "
            f"take at most {len(backbone.blocks) - 1}"
        )
    for frozen in (backbone.embed, *backbone.blocks[:number]):
        frozen.requires_grad_(False)
    backbone.pos_embed.requires_grad_(False)
    backbone.cls_token.requires_grad_(False)
