"""A graph for onnxruntime: images of one size in, [CLS] and patch tokens out, any number of images at once.

B images  L patches  R registers  N = 1 + R + L tokens  D width  S image size in px  H heads
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pathfm.errors import UserError
from pathfm.export.carried import Written, demand_images, positions_at, shape_of, whole_patches
from pathfm.models.layers import NORM_EPS, Block, LayerScale, Mlp, SwiGLU
from pathfm.models.pretrained import Pretrained
from pathfm.models.vit import ViT

_ONE_FILE = 1_500_000_000  # bytes of weights; protobuf takes 2 GB, larger ones go into a file beside the graph


class OneSizeViT(nn.Module):
    """A backbone's forward for images of one size, without packing: nothing in it depends on the number of images."""

    def __init__(self, vit: ViT, image_size: int) -> None:
        super().__init__()
        shape = shape_of(vit)
        self.num_heads, self.num_registers = shape.num_heads, shape.num_registers
        self.project, self.blocks, self.norm = vit.patch_embed.proj, vit.blocks, vit.norm
        positions = positions_at(vit, image_size)
        cls = vit.cls_token + positions[:, :1]
        prefix = cls if vit.register_tokens is None else torch.cat([cls, vit.register_tokens], dim=1)
        self.prefix, self.positions = nn.Buffer(prefix.detach()), nn.Buffer(positions[:, 1:].detach())

    def forward(self, images: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L D"]]:
        patches = self.project(images).flatten(2).transpose(1, 2) + self.positions
        tokens = torch.cat([self.prefix.expand(images.shape[0], -1, -1), patches], dim=1)
        for block in self.blocks:
            assert isinstance(block, Block)
            tokens = tokens + _scaled(self._attended(block, _normed(block.norm1, tokens)), block.ls1)
            tokens = tokens + _scaled(_fed_forward(block.mlp, _normed(block.norm2, tokens)), block.ls2)
        tokens = _normed(self.norm, tokens)
        return tokens[:, 0], tokens[:, 1 + self.num_registers :]

    def _attended(self, block: Block, tokens: Tensor) -> Tensor:
        qkv = block.attn.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (qkv[:, :, part].transpose(1, 2) for part in range(3))
        attended = functional.scaled_dot_product_attention(query, key, value)
        return block.attn.proj(attended.transpose(1, 2).flatten(2))


def write_onnx(folder: Path, model: Pretrained, image_size: int | None) -> Written:
    """model.onnx. Raises `UserError` when the libraries that write it are missing."""
    demand_images(model, "onnx")
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install 'pathfm[export]'")
    size = whole_patches(shape_of(model.vit), image_size)
    one_size = OneSizeViT(model.vit, size).eval()
    weights = sum(value.nbytes for value in one_size.state_dict().values())
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            one_size,
            (torch.zeros(2, 3, size, size),),
            folder / "model.onnx",
            dynamo=True,
            input_names=["images"],
            output_names=["cls", "patches"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=weights > _ONE_FILE,
            verbose=False,
        )
    note = (
        f"It takes images of {size} px alone, any number of them at once. Export again with --image-size for another."
    )
    loading = """\
import onnxruntime

model = onnxruntime.InferenceSession(f"{FOLDER}/model.onnx")
cls, patches = model.run(None, {"images": images.numpy()})"""
    return Written(size, False, loading, (note,))


def _normed(norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, NORM_EPS)


def _scaled(tokens: Tensor, layerscale: nn.Module) -> Tensor:
    return tokens * layerscale.gamma if isinstance(layerscale, LayerScale) else tokens


def _fed_forward(layer: nn.Module, tokens: Tensor) -> Tensor:
    if isinstance(layer, Mlp):
        return layer.fc2(functional.gelu(layer.fc1(tokens)))
    assert isinstance(layer, SwiGLU)
    gate, content = layer.w12(tokens).chunk(2, dim=-1)
    return layer.w3(functional.silu(gate) * content)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks about its own affairs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
