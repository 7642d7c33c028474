"""The face parser against formulas and published shapes, and its file."""

from __future__ import annotations

import pytest
import torch
from seeded import random_tensor, random_weights
from torch.nn import functional

from musetalk.models.face_parser import CLASSES, BiSeNet, FaceParser, load_face_parser


@pytest.fixture(scope="module")
def parser() -> BiSeNet:
    return random_weights(BiSeNet())


def test_the_network_has_the_published_size_names_and_shapes(parser):
    """148 of 191 tensors are used, 52,650,752 bytes, according to a public inventory of 79999_iter.pth."""
    tensors = parser.state_dict()
    assert len(tensors) == 191 and sum(weight.numel() for weight in parser.parameters()) == 13_300_416
    shapes = {
        "cp.resnet.conv1.weight": (64, 3, 7, 7),
        "cp.resnet.layer4.0.downsample.0.weight": (512, 256, 1, 1),
        "cp.arm32.bn_atten.running_mean": (128,),
        "cp.conv_avg.conv.weight": (128, 512, 1, 1),
        "ffm.conv1.weight": (64, 256, 1, 1),
        "conv_out.conv_out.weight": (19, 256, 1, 1),
        "conv_out16.conv.bn.num_batches_tracked": (),
        "conv_out32.conv_out.weight": (19, 64, 1, 1),
    }
    assert shapes.items() <= {name: tuple(tensor.shape) for name, tensor in tensors.items()}.items()
    unused = ("conv_out16", "conv_out32")
    used = [x for name, x in tensors.items() if not name.startswith(unused) and x.is_floating_point()]
    assert len(used) == 148 and sum(x.nbytes for x in used) == 52_650_752


def test_the_published_file_is_loaded_exactly(tmp_path, parser):
    path = tmp_path / "face-parse-bisent" / "79999_iter.pth"
    path.parent.mkdir()
    torch.save(parser.state_dict(), path)
    loaded = load_face_parser(tmp_path, torch.device("cpu")).network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in parser.state_dict().items())


def test_the_network_layer_by_layer(parser):
    tensors = parser.state_dict()

    def conv(x, name, stride=1):
        weight = tensors[f"{name}.weight"]
        return functional.conv2d(x, weight, None, stride, weight.shape[2] // 2)

    def norm(x, name):
        mean, var, *affine = (tensors[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, *affine)

    def block(x, name):
        return norm(conv(x, f"{name}.conv"), f"{name}.bn").relu()

    def refined(x, name):
        y = block(x, name + ".conv")
        return y * norm(conv(y.mean((2, 3), True), f"{name}.conv_atten"), f"{name}.bn_atten").sigmoid()

    images, features = random_tensor(1, 3, 64, 96), []
    x = norm(conv(images, "cp.resnet.conv1", 2), "cp.resnet.bn1").relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    for layer in range(1, 5):
        for index in range(2):
            name, stride = f"cp.resnet.layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            y = norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2"), f"{name}.bn2")
            if stride == 2:
                x = norm(conv(x, f"{name}.downsample.0", 2), f"{name}.downsample.1")
            x = (x + y).relu()
        features.append(x)
    _, eighth, sixteenth, last = features
    x = refined(last, "cp.arm32") + block(last.mean((2, 3), True), "cp.conv_avg")
    x = block(x.repeat_interleave(2, 2).repeat_interleave(2, 3), "cp.conv_head32") + refined(sixteenth, "cp.arm16")
    x = block(x.repeat_interleave(2, 2).repeat_interleave(2, 3), "cp.conv_head16")
    x = block(torch.cat([eighth, x], 1), "ffm.convblk")
    x = x + x * conv(conv(x.mean((2, 3), True), "ffm.conv1").relu(), "ffm.conv2").sigmoid()
    x = conv(block(x, "conv_out.conv"), "conv_out.conv_out")
    expected = functional.interpolate(x, (64, 96), mode="bilinear", align_corners=True)
    with torch.no_grad():
        torch.testing.assert_close(parser(images), expected)


def test_images_are_normalised_and_resized(parser):
    inputs = []
    hook = parser.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    image = -torch.ones(1, 3, 40, 3 * 512)
    image[:, 0, :, 1::3] = 1  # red, a third of the columns
    classes = FaceParser(parser)(image)
    hook.remove()
    assert classes.shape == (1, 512, 512) and classes.dtype == torch.uint8
    with torch.no_grad():
        assert torch.equal(classes, parser(inputs[0]).argmax(1).byte())
    expected = torch.tensor([(1 / 3 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(inputs[0][0, :, 100, 100], expected)
    names = {1: "skin", 10: "nose", 11: "mouth", 12: "upper_lip", 13: "lower_lip", 14: "neck", 17: "hair"}
    assert len(CLASSES) == 19 and {index: CLASSES[index] for index in names} == names
