"""The Inception of FID against formulas and published shapes, and its file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from seeded import random_tensor, random_weights
from torch.nn import functional

from musetalk.models.inception import Inception, load_inception


@pytest.fixture(scope="module")
def network() -> Inception:
    return random_weights(Inception())


def test_the_network_has_the_published_size_names_and_shapes(network):
    """torchvision's Inception has 27,161,264 parameters, 3,326,696 of them in its auxiliary classifier, and 1000
    classes; public inventories of the file give 95,628,359 bytes."""
    tensors = network.state_dict()
    parameters = 27_161_264 - 3_326_696 + 8 * 2049
    assert len(tensors) == 566 and sum(weight.numel() for weight in network.parameters()) == parameters
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.bn.num_batches_tracked": (),
        "Mixed_7b.branch3x3_2b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert shapes.items() <= {name: tuple(tensor.shape) for name, tensor in tensors.items()}.items()
    assert 0 < 95_628_359 - sum(x.nbytes for x in tensors.values()) < 100_000


def test_the_published_file_is_loaded_exactly(tmp_path, network):
    path = tmp_path / "inception" / "pt_inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    loaded = load_inception(tmp_path, torch.device("cpu"))
    tensors = loaded.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in network.state_dict().items())
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())


def test_the_network_layer_by_layer(network):
    tensors = network.state_dict()

    def conv(x, *names, stride=1, valid=False):
        """A chain of convolutions; the stride and the lack of padding are those of the last one."""
        for name in names:
            weight, last = tensors[f"{name}.conv.weight"], name == names[-1]
            padding = (0, 0) if valid and last else [size // 2 for size in weight.shape[2:]]
            x = functional.conv2d(x, weight, None, stride if last else 1, padding)
            mean, var, scale, shift = (
                tensors[f"{name}.bn.{kind}"][:, None, None]
                for kind in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) * (var + 0.001).rsqrt() * scale + shift).relu()
        return x

    def average(x):
        """Sums of 3 x 3 pixels over the number of those in the image."""
        kernel = torch.ones(1, 1, 3, 3)
        count = functional.conv2d(torch.ones(1, 1, *x.shape[2:]), kernel, padding=1)
        return functional.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).reshape(x.shape) / count

    def branches(block, name, count):
        return [f"{block}.{name}_{index}" for index in range(1, count + 1)]

    images = random_tensor(1, 3, 299, 299).clamp(-1, 1)
    x = conv(images, "Conv2d_1a_3x3", stride=2, valid=True)
    x = conv(conv(x, "Conv2d_2a_3x3", valid=True), "Conv2d_2b_3x3")
    x = conv(functional.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x = functional.max_pool2d(conv(x, "Conv2d_4a_3x3", valid=True), 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = [conv(x, f"{block}.branch1x1"), conv(x, *branches(block, "branch5x5", 2))]
        parts += [conv(x, *branches(block, "branch3x3dbl", 3)), conv(average(x), f"{block}.branch_pool")]
        x = torch.cat(parts, 1)
    parts = [conv(x, "Mixed_6a.branch3x3", stride=2, valid=True)]
    parts += [conv(x, *branches("Mixed_6a", "branch3x3dbl", 3), stride=2, valid=True), functional.max_pool2d(x, 3, 2)]
    x = torch.cat(parts, 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        parts = [conv(x, f"{block}.branch1x1"), conv(x, *branches(block, "branch7x7", 3))]
        parts += [conv(x, *branches(block, "branch7x7dbl", 5)), conv(average(x), f"{block}.branch_pool")]
        x = torch.cat(parts, 1)
    parts = [
        conv(x, *branches("Mixed_7a", kind, n), stride=2, valid=True)
        for kind, n in (("branch3x3", 2), ("branch7x7x3", 4))
    ]
    x = torch.cat([*parts, functional.max_pool2d(x, 3, 2)], 1)
    for block, pooled in (("Mixed_7b", average), ("Mixed_7c", lambda x: functional.max_pool2d(x, 3, 1, 1))):
        single, double = conv(x, f"{block}.branch3x3_1"), conv(x, *branches(block, "branch3x3dbl", 2))
        parts = [conv(x, f"{block}.branch1x1")]
        parts += [conv(single, f"{block}.branch3x3_2{end}") for end in "ab"]
        parts += [conv(double, f"{block}.branch3x3dbl_3{end}") for end in "ab"]
        x = torch.cat([*parts, conv(pooled(x), f"{block}.branch_pool")], 1)
    assert x.shape == (1, 2048, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(network(images), x.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_images_are_resized_bilinearly_between_centres_of_pixels(network):
    """In a ramp of 256 pixels, pixel x of 299 lies at 256 (x + 0.5) / 299 - 0.5, at the borders at the nearest."""
    inputs = []
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ramp = torch.linspace(-1, 1, 256).expand(1, 3, 64, 256)
    with torch.no_grad():
        network(ramp)
    hook.remove()
    positions = np.clip(256 * (np.arange(299) + 0.5) / 299 - 0.5, 0, 255)
    expected = torch.from_numpy(2 * positions / 255 - 1).float().expand(1, 3, 299, 299)
    torch.testing.assert_close(inputs[0], expected, rtol=0, atol=1e-5)
