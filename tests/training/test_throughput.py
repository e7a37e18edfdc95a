import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pathfm.ssl.network import Network
from pathfm.training.throughput import Crops, Usage, flops_per_sample, peak_flops
from tests.ssl.small import small_dinov2


def counted(network: Network, crops: list[torch.Tensor], patches: torch.Tensor, *, trained: bool) -> int:
    """What torch counts in a forward pass, and in a backward one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = network(crops, patches=patches)
        logits = output.projected_cls.logits().sum() + output.projected_patches.logits().sum()
        if trained:
            logits.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.1, 0.5], ids=lambda rate: f"drop path {rate}")
@pytest.mark.parametrize("separate_head", [False, True])
def test_the_arithmetic_of_a_step_is_what_torch_counts(separate_head: bool, drop_path_rate: float):
    """Crops for which drop path computes nothing do not count."""
    method = small_dinov2(separate_head=separate_head, drop_path_rate=drop_path_rate)
    samples, asked = 4, 6
    crops = [torch.randn(2 * samples, 3, 84, 84), torch.randn(4 * samples, 3, 42, 42)]
    patches = torch.arange(samples * asked)
    expected = counted(method.student, crops, patches, trained=True)
    with torch.no_grad():
        expected += counted(method.teacher, crops[:1], patches, trained=False)
    of_teacher = Crops((37, 37), asked)
    of_student = Crops((37, 37, 10, 10, 10, 10), asked)
    # Ours takes biases, norms and the prototypes' lengths for weights that multiply.
    assert samples * flops_per_sample(method.student, of_student, of_teacher) == pytest.approx(expected, rel=0.05)


def test_a_cpu_has_no_peak_to_compare_with():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert Usage(torch.device("cpu"), 1e9, None).lap(10.0) == {"mfu": None, "gpu_memory_gib": None}


def test_the_share_of_the_peak_is_work_over_time():
    assert Usage(torch.device("cpu"), 2e9, 1e12).lap(100.0)["mfu"] == pytest.approx(0.2)
