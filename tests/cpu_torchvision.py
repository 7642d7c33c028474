"""A plugin of pytest for `make test-mmpose`: on torch without CUDA, PyPI's torchvision can be imported only once its
operators have names. mmpose needs no more of it, and diffusers cannot be imported beside one that cannot be."""

import torch

if torch.version.cuda is None:
    LIBRARY = torch.library.Library("torchvision", "DEF")  # forgotten where it is let go
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
