"""A pytest plugin for `make test-mmpose`: defines the operators without which PyPI's torchvision cannot be imported on
torch for CPUs. mmpose needs no more of torchvision, and diffusers fails beside one that cannot be imported."""

import torch

if torch.version.cuda is None:
    LIBRARY = torch.library.Library("torchvision", "DEF")  # its definitions last as long as this reference
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
