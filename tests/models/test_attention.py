"""Attention over packed tokens: every backend against softmax written out, and when a backend may be used."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from pathfm.errors import UserError
from pathfm.models import attention
from pathfm.models.attention import Layout, attend, choose_backend, what_stops
from pathfm.models.layers import Block
from tests.several_ranks import on_ranks

CPU = torch.device("cpu")
LAYOUT: Layout = ((2, 5), (3, 4), (1, 1))
LAYOUTS: list[Layout] = [LAYOUT, ((1, 7),), ((4, 6),), ((1, 3), (5, 9)), ((2, 5), (2, 5))]
TOKENS = 2 * 5 + 3 * 4 + 1


def lengths_of(layout: Layout) -> list[int]:
    return [tokens for crops, tokens in layout for _ in range(crops)]


def softmax_written_out(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    rows = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        scores = torch.einsum("qhe,khe->hqk", q, k) / query.shape[-1] ** 0.5
        rows.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v))
    return torch.cat(rows)


def forget() -> None:
    for kept in (attention._what_was_found, attention._block_diagonal_mask, attention._kept_bounds):
        kept.cache_clear()


@pytest.fixture
def clear_what_was_found_out() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def pretend_xformers(monkeypatch: pytest.MonkeyPatch, clear_what_was_found_out: None) -> SimpleNamespace:
    """A stand-in with xFormers' interface that computes on CPU; `scale` lets it give wrong numbers."""
    settings = SimpleNamespace(scale=1.0)

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: list[int]) -> Tensor:
        assert query.ndim == 4
        assert len(query) == 1
        return settings.scale * softmax_written_out(query[0], key[0], value[0], attn_bias)[None]

    def from_seqlens(lengths: list[int], *, device: torch.device) -> list[int]:
        return lengths

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    ops.fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=SimpleNamespace(from_seqlens=from_seqlens)))
    package = ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return settings


@pytest.fixture
def pretend_varlen(monkeypatch: pytest.MonkeyPatch, clear_what_was_found_out: None) -> SimpleNamespace:
    """A stand-in for torch's, that computes on CPU; `noise` makes every backward pass another."""
    settings = SimpleNamespace(noise=0.0)

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(context: object, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:
            settings.noise *= 2
            return gradient + settings.noise

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, key_bounds: Tensor, longest: int, longest_key: int
    ) -> Tensor:
        assert bounds.dtype == torch.int32
        lengths = bounds.diff().tolist()
        assert max(lengths) == longest == longest_key
        return Noisy.apply(softmax_written_out(query, key, value, lengths))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return settings


def output_and_gradients(
    backend: str, layout: Layout, device: torch.device = CPU, dtype: torch.dtype = torch.float32, width: int = 8
) -> list[Tensor]:
    """On the same inputs every time; `written out` is the softmax, computed in fp32."""
    tokens = sum(lengths_of(layout))
    drawn = torch.randn(4, tokens, 2, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    inputs, gradient = drawn[:3].clone().requires_grad_(), drawn[3]
    if backend == "written out":
        attended = softmax_written_out(*inputs.float().unbind(), lengths_of(layout))
    else:
        attended = attend(*inputs.unbind(), layout, backend)
    attended.backward(gradient.to(attended.dtype))
    return [attended.detach().float(), *inputs.grad.float().unbind()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_fp32", "xformers", "varlen"])
def test_attention_and_its_gradients_stay_within_a_crop(
    backend: str, layout: Layout, pretend_xformers: SimpleNamespace, pretend_varlen: SimpleNamespace
) -> None:
    torch.testing.assert_close(output_and_gradients(backend, layout), output_and_gradients("written out", layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_fp32"])
def test_bf16_under_autocast_gives_nearly_the_same(backend: str, layout: Layout) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ours = output_and_gradients(backend, layout, dtype=torch.bfloat16)
    expected = output_and_gradients("written out", layout, dtype=torch.bfloat16)
    torch.testing.assert_close(ours, expected, atol=4e-2, rtol=4e-2)


def test_sdpa_in_fp32_rounds_its_result_alone() -> None:
    query, key, value = torch.randn(3, TOKENS, 2, 8).bfloat16().unbind()
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(query, key, value, LAYOUT, "sdpa_fp32")
    expected = softmax_written_out(query.float(), key.float(), value.float(), lengths_of(LAYOUT))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected.bfloat16(), atol=0, rtol=2**-7)  # one unit in the last place


def graphs_of_a_compiled_block() -> int:
    """How many a block is compiled to that sees two layouts, each twice; raises where one would break in two.

    The meta device stands for a GPU: there varlen can be traced, and shapes are all that it computes.
    """
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    with torch.device("meta"):
        block = Block(128, 2, drop_path_rate=0.2).to(torch.bfloat16)
    compiled = torch.compile(block.forward, backend=keep, fullgraph=True)
    for layout in 2 * [((4, 17), (8, 5)), ((4, 17),)]:
        shape = (sum(lengths_of(layout)), 128)
        tokens = torch.zeros(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        compiled(tokens, layout, "varlen").float().sum().backward()
    return len(graphs)


def test_a_block_with_varlen_compiles_to_one_graph_for_each_layout() -> None:
    assert on_ranks(1, graphs_of_a_compiled_block) == [2]  # in a process of its own, without checks of shapes


def test_bounds_are_kept_for_a_layout(clear_what_was_found_out: None) -> None:
    first, again = (attention._bounds_of_crops(LAYOUT, CPU) for _ in range(2))
    assert first is again
    assert first.tolist() == [0, 5, 10, 14, 18, 22, 23]


def test_xformers_is_refused_where_a_tiny_forward_fails(clear_what_was_found_out: None) -> None:
    if what_stops("xformers", CPU, torch.float32) is None:
        pytest.skip("xFormers works on this CPU")
    with pytest.raises(
        UserError, match=r"student.attention=xformers does not work here \(cpu.*use student.attention=sdpa"
    ):
        choose_backend("xformers", CPU, torch.float32)


def test_xformers_that_imports_but_computes_something_else_is_refused(pretend_xformers: SimpleNamespace) -> None:
    pretend_xformers.scale = 1.5
    with pytest.raises(UserError, match="numbers differ"):
        choose_backend("xformers", CPU, torch.float32)


def test_xformers_is_used_where_a_tiny_forward_and_backward_works(pretend_xformers: SimpleNamespace) -> None:
    assert choose_backend("xformers", CPU, torch.float32) == "xformers"


def test_finding_out_works_inside_inference_and_autocast_and_draws_no_random_numbers(
    pretend_xformers: SimpleNamespace,
) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert choose_backend("xformers", CPU, torch.bfloat16) == "xformers"
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_is_sdpa_on_a_cpu() -> None:
    assert choose_backend("auto", CPU, torch.float32) == "sdpa"


def test_varlen_is_refused_where_there_is_no_kernel_for_it() -> None:
    with pytest.raises(UserError, match=r"student.attention=varlen does not work here \(cpu.*NotImplementedError"):
        choose_backend("varlen", CPU, torch.bfloat16)


def test_in_fp32_varlen_gives_way_to_sdpa() -> None:
    assert choose_backend("varlen", CPU, torch.float32) == "sdpa"


def test_where_a_run_must_repeat_itself_gradients_that_do_not_are_refused(pretend_varlen: SimpleNamespace) -> None:
    pretend_varlen.noise = 1e-6
    assert what_stops("varlen", CPU, torch.bfloat16) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert "differ from call to call" in what_stops("varlen", CPU, torch.bfloat16)
        assert what_stops("sdpa_fp32", CPU, torch.bfloat16) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, ((8, 257), (32, 50))])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_fp32", "xformers", "varlen"])
def test_on_cuda_every_backend_that_works_gives_what_softmax_gives(
    backend: str, layout: Layout, deterministic: bool, clear_what_was_found_out: None
) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.use_deterministic_algorithms(deterministic)
    try:
        if problem := what_stops(backend, device, dtype):
            pytest.skip(f"{backend} does not work here: {problem}")
        ours = output_and_gradients(backend, layout, device, dtype, width=64)
        again = output_and_gradients(backend, layout, device, dtype, width=64)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = output_and_gradients("written out", layout, device, dtype, width=64)
    torch.testing.assert_close(ours, expected, atol=4e-2, rtol=4e-2)
    assert not deterministic or all(one.equal(other) for one, other in zip(ours, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_auto_gives_the_numbers_of_sdpa() -> None:
    device = torch.device("cuda")
    query, key, value = torch.randn(3, TOKENS, 2, 64, device=device, dtype=torch.bfloat16).unbind()
    chosen = choose_backend("auto", device, torch.bfloat16)
    ours, expected = (attend(query, key, value, LAYOUT, backend) for backend in (chosen, "sdpa"))
    torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)
