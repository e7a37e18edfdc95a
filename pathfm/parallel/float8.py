"""Linear layers of blocks in 8 bits (arXiv 2209.05433): products of e4m3 numbers, e5m2 for what comes back, by torchao.

Every tensor is scaled by one power of two, so that its largest number fits; where the mantissa is cut off then does not
depend on what else is in the batch. Weights, moments, norms, attention and heads stay as they are, and so do all names.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pathfm.errors import UserError

_FIRST_WITH_FP8 = (8, 9)  # compute capability of NVIDIA's Ada; Hopper is 9.0
_LARGEST_ERROR = 0.2  # of the probe, relative to fp32; three bits of mantissa give 0.04 forward, two give 0.09 backward


def use_float8(blocks: Sequence[nn.Module], device: torch.device, *, emulate: bool = False) -> None:
    """Change the linear layers of blocks in place, before they are recomputed, compiled and sharded.

    Raises `UserError` where torchao is missing or the device cannot do it. `emulate`: the same rounding with ordinary
    arithmetic, on any device, slower than without.
    """
    if not emulate and (problem := what_stops_float8(device)):
        raise UserError(f"train.precision=fp8 does not work here ({device}: {problem}); use train.precision=bf16")
    for block in blocks:
        _convert(block, emulate=emulate)


def what_stops_float8(device: torch.device) -> str | None:
    """None when a tiny forward and backward gave about the numbers of fp32, else the reason in one line.

    Raises `UserError` without torchao.
    """
    if device.type != "cuda":
        return "only GPUs multiply in fp8"
    if (capability := torch.cuda.get_device_capability(device)) < _FIRST_WITH_FP8:
        needed, found = (".".join(map(str, version)) for version in (_FIRST_WITH_FP8, capability))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}, and fp8 needs {needed}"
    return probe(device)


def probe(device: torch.device, *, emulate: bool = False) -> str | None:
    """What is wrong with a tiny forward and backward on a device. No random numbers are drawn."""
    linear = nn.utils.skip_init(nn.Linear, 64, 32, bias=False, device=device)
    layer = nn.Sequential(linear)  # what holds it, and can be given another in its place
    rows = torch.linspace(-9, 9, 17 * 64, device=device).sin().view(17, 64)  # an odd number of rows, as tokens are
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-7, 7, 32 * 64, device=device).cos().view(32, 64))
    expected = _forward_and_backward(layer, rows)
    _convert(layer, emulate=emulate)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            found = _forward_and_backward(layer, rows)
    except Exception as error:  # whatever an optional library raises on a machine it does not support
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    for name, ours, oracle in zip(("output", "gradient"), found, expected, strict=True):
        error_share = float((ours - oracle).norm() / oracle.norm())
        if not error_share < _LARGEST_ERROR:
            return f"the {name} of a tiny layer is off by {error_share:.2f} of its size"
    return None


def _forward_and_backward(layer: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the weight."""
    output = layer(rows).float()
    (gradient,) = torch.autograd.grad(output.square().sum(), [next(layer.parameters())])
    return output.detach(), gradient.float()


def _convert(module: nn.Module, *, emulate: bool) -> None:
    try:
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels that nothing here uses
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError("train.precision=fp8 needs torchao: pip install 'pathfm[fp8]'") from error
    settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True, round_scales_to_power_of_2=True)
    convert_to_float8_training(module, config=settings)
