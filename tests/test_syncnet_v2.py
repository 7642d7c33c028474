"""SyncNet v2 against formulas and published shapes, its file, and its MFCCs against golden values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from seeded import random_tensor, random_weights
from torch.nn import functional

from musetalk.models.syncnet_v2 import SyncNetV2, load_syncnet_v2, mfcc


@pytest.fixture(scope="module")
def network() -> SyncNetV2:
    return random_weights(SyncNetV2())


def test_the_network_has_the_published_size_names_and_shapes(network):
    """54,573,114 bytes, according to public inventories of syncnet_v2.model: these tensors and 12 KB of names."""
    tensors = network.state_dict()
    assert len(tensors) == 102 and sum(weight.numel() for weight in network.parameters()) == 13_631_616
    shapes = {
        "netcnnaud.0.weight": (64, 1, 3, 3),
        "netcnnaud.4.weight": (192, 64, 3, 3),
        "netcnnaud.8.weight": (384, 192, 3, 3),
        "netcnnaud.15.running_mean": (256,),
        "netcnnaud.18.weight": (512, 256, 5, 4),
        "netcnnaud.19.num_batches_tracked": (),
        "netfcaud.0.weight": (512, 512),
        "netfcaud.1.running_var": (512,),
        "netfcaud.3.weight": (1024, 512),
        "netcnnlip.0.weight": (96, 3, 5, 7, 7),
        "netcnnlip.4.weight": (256, 96, 1, 5, 5),
        "netcnnlip.8.weight": (256, 256, 1, 3, 3),
        "netcnnlip.18.weight": (512, 256, 1, 6, 6),
        "netfclip.3.bias": (1024,),
    }
    assert shapes.items() <= {name: tuple(tensor.shape) for name, tensor in tensors.items()}.items()
    assert 0 < 54_573_114 - sum(x.nbytes for x in tensors.values() if x.is_floating_point()) < 13_000


def test_the_published_file_is_loaded_exactly(tmp_path, network):
    """Like other files of its time it may be without num_batches_tracked."""
    path = tmp_path / "syncnet" / "syncnet_v2.model"
    path.parent.mkdir()
    tensors = {name: x for name, x in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    loaded = load_syncnet_v2(tmp_path, torch.device("cpu"))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())


def test_the_network_layer_by_layer(network):
    tensors = network.state_dict()

    def block(x, name, index, stride=1, padding=0):
        """A window of faces is an image of 15 channels to the first layer, and later layers see one image."""
        weight, bias = (tensors[f"{name}.{index}.{kind}"] for kind in ("weight", "bias"))
        if weight.ndim == 5:
            weight = weight.flatten(1, 2)
        x = functional.conv2d(x, weight, bias, stride, padding)
        norm = (tensors[f"{name}.{index + 1}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *norm).relu()

    def embed(x, name):
        x = functional.linear(x.flatten(1), tensors[f"{name}.0.weight"], tensors[f"{name}.0.bias"])
        norm = (tensors[f"{name}.1.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
        x = functional.batch_norm(x, *norm).relu()
        return functional.linear(x, tensors[f"{name}.3.weight"], tensors[f"{name}.3.bias"])

    faces, cepstra = random_tensor(1, 3, 5, 224, 224).sigmoid() * 255, random_tensor(2, 1, 13, 20)
    x = block(faces.flatten(1, 2), "netcnnlip", 0, stride=2)
    x = block(functional.max_pool2d(x, 3, 2), "netcnnlip", 4, 2, 1)
    x = functional.max_pool2d(x, 3, 2, 1)
    for index in (8, 11, 14):
        x = block(x, "netcnnlip", index, padding=1)
    x = block(functional.max_pool2d(x, 3, 2), "netcnnlip", 18)
    torch.testing.assert_close(network.embed_faces(faces), embed(x, "netfclip"), rtol=1e-4, atol=1e-2)
    x = block(block(cepstra, "netcnnaud", 0, padding=1), "netcnnaud", 4, padding=1)
    x = functional.max_pool2d(x, 3, (1, 2))
    for index in (8, 11, 14):
        x = block(x, "netcnnaud", index, padding=1)
    x = block(functional.max_pool2d(x, 3, 2), "netcnnaud", 18)
    torch.testing.assert_close(network.embed_audio(cepstra), embed(x, "netfcaud"), rtol=1e-4, atol=1e-4)


# MFCCs.


def test_mfccs_are_those_of_python_speech_features():
    """The values are those of python_speech_features 0.6, mfcc(samples, 16000); the last frame has zeros at its end."""
    k = np.arange(1000)
    samples = np.round(9000 * np.sin(k * k / 3000) + 500 * np.sin(2.1 * k)).astype(np.int16)
    cepstra = mfcc(samples)
    assert cepstra.shape == (5, 13)
    first = (
        *(19.381793, 16.509047, 21.469091, -24.974876, -20.034254, -15.971984, -31.840251),
        *(24.896106, -27.394549, 29.648197, -23.181908, 4.100909, -8.749111),
    )
    last = (
        *(21.487128, -0.818851, -33.045539, -31.753827, 31.169929, 30.019702, -18.032324),
        *(-8.345612, -21.328698, 32.078042, -15.449363, 7.644149, -4.253105),
    )
    np.testing.assert_allclose(cepstra[[0, -1]], (first, last), atol=1e-5)


def test_mfccs_of_an_impulse_by_hand():
    """Its spectrum is flat but for the preemphasis: |1 - 0.97 exp(-iw)|^2 at each bin."""
    samples = np.zeros(400, np.int16)
    samples[0] = 1000
    bins = np.abs(1 - 0.97 * np.exp(-2j * np.pi * np.arange(257) / 512)) ** 2 * 1e6 / 512
    assert mfcc(samples)[0, 0] == pytest.approx(np.log(bins.sum()))


@pytest.mark.parametrize("count, frames", [(1, 1), (400, 1), (401, 2), (560, 2), (561, 3), (16_000, 99)])
def test_mfccs_of_silence_are_finite_and_there_are_100_a_second(count, frames):
    cepstra = mfcc(np.zeros(count, np.int16))
    assert cepstra.shape == (frames, 13)
    np.testing.assert_allclose(cepstra[:, 0], np.log(2.0**-52))
    np.testing.assert_allclose(cepstra[:, 1:], 0, atol=1e-9)
