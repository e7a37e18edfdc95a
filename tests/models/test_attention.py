"""Attention over packed tokens: every backend against softmax written out, and when a backend may be used."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from pathfm.errors import UserError
from pathfm.models import attention
from pathfm.models.attention import Layout, attend, choose_backend

CPU = torch.device("cpu")
LAYOUT: Layout = ((2, 5), (3, 4), (1, 1))
TOKENS = 2 * 5 + 3 * 4 + 1


def softmax_written_out(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    rows = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        scores = torch.einsum("qhe,khe->hqk", q, k) / query.shape[-1] ** 0.5
        rows.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v))
    return torch.cat(rows)


@pytest.fixture
def clear_what_was_found_out() -> None:
    attention._what_stops_xformers.cache_clear()
    attention._block_diagonal_mask.cache_clear()
    yield
    attention._what_stops_xformers.cache_clear()
    attention._block_diagonal_mask.cache_clear()


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


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_attention_stays_within_a_crop(backend: str, pretend_xformers: SimpleNamespace) -> None:
    query, key, value = torch.randn(3, TOKENS, 2, 8).unbind()
    lengths = [5, 5, 4, 4, 4, 1]
    expected = softmax_written_out(query, key, value, lengths)
    torch.testing.assert_close(attend(query, key, value, LAYOUT, backend), expected)


def test_xformers_is_refused_where_a_tiny_forward_fails(clear_what_was_found_out: None) -> None:
    if attention._what_stops_xformers(CPU, torch.float32) is None:
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_auto_gives_the_numbers_of_sdpa() -> None:
    device = torch.device("cuda")
    query, key, value = torch.randn(3, TOKENS, 2, 64, device=device, dtype=torch.bfloat16).unbind()
    chosen = choose_backend("auto", device, torch.bfloat16)
    ours, expected = (attend(query, key, value, LAYOUT, backend) for backend in (chosen, "sdpa"))
    torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)
