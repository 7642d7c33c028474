"""Weight files: finding, reading, strict loading, error messages and fingerprints."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hostile import refusal
from torch import nn

from musetalk.models.face_parser import BiSeNet
from musetalk.models.inception import Inception
from musetalk.models.lpips import VGG16, Heads
from musetalk.models.sources import SOURCES
from musetalk.models.syncnet import (
    STABLE_SYNCNET_16,
    STABLE_SYNCNET_16_ATTENTION,
    StableSyncNet,
    Wav2LipSyncNet,
)
from musetalk.models.syncnet_v2 import SyncNetV2
from musetalk.models.weights import (
    WeightsError,
    find,
    fingerprint,
    freeze,
    load_strictly,
    read_tensors,
    unwrap,
)


def network(seed: int = 0) -> nn.Module:
    """A small network with an integer buffer, that of batch norm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Finding.


def test_a_missing_file_is_reported_with_path_and_source(tmp_path):
    for name, source in SOURCES.items():
        assert str(source) in refusal(lambda name=name: find(tmp_path, name), str(tmp_path / name))


def test_find_returns_files_but_not_folders(tmp_path):
    path = tmp_path / "whisper" / "tiny.pt"
    path.mkdir(parents=True)
    with pytest.raises(WeightsError, match="missing"):
        find(tmp_path, "whisper/tiny.pt")
    path.rmdir()
    path.touch()
    assert find(tmp_path, "whisper/tiny.pt") == path


# Reading.


def test_tensors_are_read_from_all_formats(tmp_path):
    tensors = copied(network())
    torch.save(tensors, tmp_path / "a.bin")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    for name in ("a.bin", "old.pth", "a.safetensors"):
        result = read_tensors(tmp_path / name)
        assert result.keys() == tensors.keys() and all(torch.equal(result[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_an_unreadable_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    if name.endswith("bin"):
        torch.save(copied(network()), path)
    else:
        safetensors.torch.save_file(copied(network()), path)
    content = path.read_bytes()
    pickles = b"\x80\x02.", b"\x80\x02N.", b"\x80\x02h\x05.", b"\x80\x02}q\x00."  # not written by torch
    for broken in (b"", b"version https://git-lfs.github.com/spec/v1\n", content[:50], content[:-30], *pickles):
        path.write_bytes(broken)
        refusal(lambda: read_tensors(path), str(path))
    path.unlink()
    refusal(lambda: read_tensors(path), str(path))
    path.mkdir()
    refusal(lambda: read_tensors(path), str(path))


def test_a_torchscript_program_is_recognised(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(path := tmp_path / "lipsync_expert.pth")
    assert "is a TorchScript program" in refusal(lambda: read_tensors(path), str(path))


def test_a_class_that_is_not_allowed_is_refused_by_name(tmp_path):
    torch.save({"0.weight": torch.ones(1), "more": Fraction(1, 2)}, path := tmp_path / "a.pth")
    assert "it references fractions.Fraction" in refusal(lambda: read_tensors(path), str(path))


def test_a_file_without_tensors_by_name_is_refused(tmp_path):
    for value in ([torch.ones(1)], torch.ones(1), {"state_dict": torch.ones(1)}, {"unet": {}, "optimizer": {}}):
        torch.save(value, path := tmp_path / "a.pth")
        refusal(lambda path=path: unwrap(read_tensors(path), path), f"{path} holds no ")


def test_unwrap_removes_the_checkpoint_and_the_prefix():
    path, x = Path("a.pth"), torch.ones(1)
    assert unwrap({"a.module.b": x}, path) == {"a.module.b": x}
    assert unwrap({"module.a": x, "module.module.b": x}, path) == {"a": x, "module.b": x}
    assert unwrap({"module.a": x, "b": x}, path) == {"module.a": x, "b": x}
    assert unwrap({"state_dict": {"module.a": x}, "optimizer": None}, path) == {"a": x}


# Loading.


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_the_counter_of_a_batch_norm_may_be_missing(device):
    tensors = copied(network(1))
    del tensors["1.num_batches_tracked"]
    with torch.device(device):
        module = network(0)
    load_strictly(module, tensors, Path("a.pth"))
    assert module[1].num_batches_tracked == 0 and same(module, network(1))
    del tensors["1.running_var"]
    with pytest.raises(WeightsError, match="1 missing: 1.running_var$"):
        load_strictly(network(0), tensors, Path("a.pth"))


def test_a_network_on_the_meta_device_takes_over_the_tensors():
    with torch.device("meta"):
        empty = network()
    tensors = copied(network(1))
    load_strictly(empty, tensors, Path("a.bin"))
    assert all(tensor.data_ptr() == tensors[name].data_ptr() for name, tensor in empty.state_dict().items())


def test_all_mismatches_are_reported_and_nothing_is_loaded():
    module, tensors = network(0), copied(network(1))
    before = copied(module)
    del tensors["0.weight"], tensors["1.running_mean"]
    tensors["2.weight"] = torch.zeros(2, 5)
    tensors["0.bias"] = torch.zeros(4, dtype=torch.int64)
    tensors |= {f"extra.{k}": torch.zeros(1) for k in range(5)}
    message = refusal(lambda: load_strictly(module, tensors, Path("models/a.bin")), "models/a.bin ")
    assert "2 missing: 0.weight, 1.running_mean" in message
    assert "5 unexpected: extra.0, extra.1, extra.2, ..." in message
    assert "1 wrongly shaped: 2.weight (2, 5) instead of (2, 4)" in message
    assert "1 not floating point: 0.bias torch.int64" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_objects_other_than_tensors_are_skipped(tmp_path):
    """As in trainers' checkpoints: optimizer state, a shared list, NumPy values, options, a shared storage."""
    module, epochs = network(1), [1, 2]
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    others = {
        "optimizer": optimizer.state_dict(),
        "epochs": epochs,
        "epochs_again": epochs,
        "best": np.float64(0.5),
        "curve": np.arange(3),
        "options": argparse.Namespace(output=Path("checkpoints"), rate=1e-4),
        "none": None,
    }
    tensors, tied = copied(module), module[0].weight
    for values in (tensors | others, others | {"state_dict": tensors, "tied": [tied, tied]}):
        for zipped in (True, False):
            torch.save(values, path := tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
            load_strictly(second := network(0), unwrap(read_tensors(path), path), path)
            assert same(second, module)


def test_a_file_of_another_network_is_recognised():
    with torch.device("meta"):
        networks = {
            "Wav2Lip's SyncNet": Wav2LipSyncNet(1),
            "a StableSyncNet without attention": StableSyncNet(STABLE_SYNCNET_16),
            "a StableSyncNet with attention": StableSyncNet(STABLE_SYNCNET_16_ATTENTION),
            "SyncNet v2": SyncNetV2(),
            "an Inception": Inception(),
            "the face parser": BiSeNet(),
            "a ResNet": BiSeNet().cp.resnet,
            "VGG": VGG16(),
            "the LPIPS heads": Heads(),
        }
    for kind, other in networks.items():
        tensors = {name: torch.empty(()).expand(tensor.shape) for name, tensor in other.state_dict().items()}
        with pytest.raises(WeightsError, match=f"a.pth does not fit Linear: .* looks like {kind}$"):
            load_strictly(nn.Linear(1, 1), tensors, Path("a.pth"))
    with pytest.raises(WeightsError) as caught:  # the same network with other shapes
        load_strictly(Heads(), {"lin0.model.1.weight": torch.ones(1, 3, 1, 1)}, Path("a.pth"))
    assert "4 missing" in str(caught.value) and "looks like" not in str(caught.value)


def test_a_frozen_network_is_in_eval_mode_without_gradients():
    module = network().train()
    assert freeze(module) is module
    assert not module[1].training and not any(weight.requires_grad for weight in module.parameters())


# Fingerprints.


def test_fingerprint_does_not_depend_on_the_file_format(tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in copied(network(1)).items()}
    torch.save(half, tmp_path / "a.bin")
    safetensors.torch.save_file(half, tmp_path / "a.safetensors")
    prints = set()
    for name in ("a.bin", "a.safetensors"):
        load_strictly(module := network(0), read_tensors(tmp_path / name), tmp_path / name)
        prints.add(fingerprint(module))
    rounded = network(1)
    rounded.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    assert prints == {fingerprint(rounded)} == {fingerprint(rounded.half())}
    assert prints != {fingerprint(network(1))}


def test_fingerprint_does_not_depend_on_memory_format_or_order():
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3)
    before = fingerprint(first)
    assert fingerprint(first.to(memory_format=torch.channels_last)) == before
    reordered = nn.Module()
    reordered.register_parameter("bias", first.bias)
    reordered.register_parameter("weight", first.weight)
    assert fingerprint(reordered) == before


def test_any_changed_value_or_name_changes_the_fingerprint():
    before = fingerprint(network())
    assert before == fingerprint(network()) and len(before) == 16
    for name in network().state_dict():
        module = network()
        module.state_dict()[name].view(-1)[-1:].add_(1)
        assert fingerprint(module) != before, name
    layer = nn.Linear(2, 2)
    assert fingerprint(nn.ModuleDict({"a": layer})) != fingerprint(nn.ModuleDict({"b": layer}))
