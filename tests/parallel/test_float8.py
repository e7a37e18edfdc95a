"""Linear layers of blocks in 8 bits, by arithmetic that rounds as a GPU would: near to bf16, under the same names."""

import builtins
import math
import re
from functools import partial

import pytest
import torch

from pathfm.errors import UserError
from pathfm.models.layers import Block, Norm
from pathfm.parallel.apply import mesh_of, parallelise
from pathfm.parallel.config import ParallelConfig
from pathfm.parallel.float8 import probe, use_float8, what_stops_float8
from pathfm.parallel.tensors import whole_tensors_from_all
from pathfm.schedule import StepValues
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.state import TrainingState
from pathfm.training.step import Ranks, build_loss_scale, build_optimizer, compute_dtype, train_step
from tests.several_ranks import on_ranks
from tests.ssl.small import random_batch, shares_of, small_dinov2, spread_out

CPU = torch.device("cpu")
VALUES = StepValues(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05)
# Cutting a mantissa of m bits off moves a number by up to 2^-(m+1) of itself, evenly spread: 1 / sqrt(3) of that on
# average of squares. A product has two such factors, and the errors of a sum's terms are independent, so the sum's size
# shares its terms' relative error. Averages are smaller: few numbers lie at the lower end of a power.
E4M3, E5M2 = (2.0 ** -(bits + 1) / math.sqrt(3) for bits in (3, 2))
FORWARD = math.hypot(E4M3, E4M3)  # 0.051
BACKWARD = math.hypot(E5M2, E4M3)  # 0.081, once more for every layer behind
LAYOUT = ((5, 7), (1, 2))  # 37 tokens: no multiple of anything


def block(*, float8: bool) -> Block:
    torch.manual_seed(0)
    block = Block(64, 4, layerscale=1.0)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    if float8:
        use_float8([block], CPU, emulate=True)
    return block


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_block_in_8_bits_is_as_near_to_bf16_as_its_mantissa_allows():
    outputs, gradients = [], []
    for float8 in (True, False):
        torch.manual_seed(1)
        tokens = torch.randn(37, 64)
        ours = block(float8=float8)
        with torch.autocast("cpu", torch.bfloat16):
            added = ours(tokens, LAYOUT, "sdpa") - tokens
        (added * torch.randn(37, 64)).sum().backward()
        outputs.append(added.detach())
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert 0.01 < relative(*outputs) < 2 * FORWARD  # of two layers one after the other
    for name, gradient in gradients[1].items():
        assert relative(gradients[0][name], gradient) < 2 * BACKWARD, name
    assert relative(gradients[0]["mlp.fc2.weight"], gradients[1]["mlp.fc2.weight"]) > 0.01


def test_only_linear_layers_change_and_names_and_parameters_stay():
    plain, ours = block(float8=False), block(float8=False)
    parameters = dict(ours.named_parameters())
    use_float8([ours], CPU, emulate=True)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(parameter is parameters[name] for name, parameter in ours.named_parameters())
    changed = [name for name, module in ours.named_modules() if type(module).__name__ == "Float8Linear"]
    assert changed == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert isinstance(ours.norm1, Norm)


def test_what_a_crop_gives_hardly_depends_on_its_company():
    """Scales are powers of two: those of a tensor with larger numbers cut the mantissa at the same place."""
    torch.manual_seed(2)
    crop, loud = torch.randn(7, 64), 40 * torch.randn(7, 64)
    ours = block(float8=True)
    linear = ours.attn.qkv
    with torch.no_grad():
        alone, together = linear(crop), linear(torch.cat([crop, loud]))[:7]
    assert relative(together, alone) < 0.2 * FORWARD


def test_fp8_is_refused_in_one_line_where_the_device_cannot():
    with pytest.raises(UserError, match=r"^train.precision=fp8 does not work here \(cpu: only GPUs .*\); use .*bf16$"):
        use_float8([block(float8=False)], CPU)


def test_a_gpu_without_fp8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    reason = what_stops_float8(torch.device("cuda", 0))
    assert reason == "NVIDIA A100 has compute capability 8.0, and fp8 needs 8.9"


def test_without_torchao_it_is_said_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_torchao(name, *arguments, **settings):
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without_torchao)
    with pytest.raises(UserError, match=r"^train.precision=fp8 needs torchao: pip install 'pathfm\[fp8\]'$"):
        use_float8([block(float8=False)], CPU, emulate=True)


def test_the_probe_passes_right_numbers_and_stops_wrong_ones(monkeypatch):
    before = torch.get_rng_state()
    assert probe(CPU, emulate=True) is None
    assert torch.equal(torch.get_rng_state(), before)
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda left, right: 2 * real(left, right))
    assert re.fullmatch(r"the output of a tiny layer is off by \d\.\d\d of its size", probe(CPU, emulate=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_either_multiplies_in_fp8_or_is_refused():
    device = torch.device("cuda")
    capable = torch.cuda.get_device_capability(device) >= (8, 9)
    assert (what_stops_float8(device) is None) == capable


def two_steps(precision: str, parallel: ParallelConfig) -> tuple[list[float], list[str]]:
    """Losses, and the names of what is kept."""
    several = torch.distributed.is_initialized()
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
    method, train = small_dinov2(), TrainConfig(precision=precision)
    spread_out(method)
    if precision == "fp8":
        use_float8([*method.student.layers(), *method.teacher.layers()], CPU, emulate=True)
    mesh = mesh_of(world_size, world_size, CPU)
    for network, trained in ((method.student, True), (method.teacher, False)):
        parallelise(network, network.layers(), parallel, mesh, compute_dtype(train), trained=trained)
    state = TrainingState(method, build_optimizer(method, OptimConfig()), build_loss_scale(train, CPU))
    for step in range(2):
        share = shares_of(random_batch(8, seed=step), world_size)[rank]
        train_step(state, [share], VALUES, train, OptimConfig(), Ranks(rank, world_size))
    return state.meter.read()["total_loss"], list(whole_tensors_from_all(state.tensors(), keep=True))


def several_ways(ways: list[tuple[str, ParallelConfig]]) -> list[tuple[list[float], list[str]]]:
    torch.compile = partial(torch.compile, backend="aot_eager")
    return [two_steps(*way) for way in ways]


def test_steps_in_8_bits_are_near_those_in_bf16_also_sharded_recomputed_and_compiled():
    plain, sharded = ParallelConfig(), ParallelConfig(strategy="fsdp", recompute="blocks")
    ((expected, names), (alone, same_names), (compiled, _)) = on_ranks(
        1, several_ways, [("bf16", plain), ("fp8", plain), ("fp8", ParallelConfig(compile=True))]
    )[0]
    assert names == same_names
    assert alone == pytest.approx(expected, rel=0.05)
    assert alone != expected
    assert compiled == pytest.approx(alone, rel=0.01)
    for ((losses, of_shards),) in on_ranks(2, several_ways, [("fp8", sharded)]):
        assert of_shards == names
        assert losses == pytest.approx(alone, rel=0.02)
