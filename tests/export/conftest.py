"""timm and transformers import torchvision, and PyPI's cannot load its operators beside a CPU build of torch."""

import importlib
import sys

import pytest
import torch

_UNUSED = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@pytest.fixture(scope="session", autouse=True)
def importable_torchvision():
    """Where its operators are missing, the two that its import asks for are declared; nothing here calls them."""
    if importlib.util.find_spec("torchvision") is None:
        yield
        return
    try:
        import torchvision  # noqa: F401

        declared = None
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}{_UNUSED}")
        importlib.import_module("torchvision")
    yield
    del declared
