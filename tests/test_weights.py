"""Weight files: strict loading, skipping of other objects, error reports."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from musetalk.models.sources import SOURCES
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


# Finding.


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_file_is_reported_with_path_and_source(tmp_path, name):
    with pytest.raises(WeightsError) as caught:
        find(tmp_path, name)
    assert str(tmp_path / name) in str(caught.value) and str(SOURCES[name]) in str(caught.value)


def test_find_returns_files_but_not_folders(tmp_path):
    path = tmp_path / "whisper" / "tiny.pt"
    path.mkdir(parents=True)
    with pytest.raises(WeightsError, match="missing"):
        find(tmp_path, "whisper/tiny.pt")
    path.rmdir()
    path.touch()
    assert find(tmp_path, "whisper/tiny.pt") == path


# Reading.


def test_tensors_are_read_from_both_formats(tmp_path):
    tensors = copied(network())
    torch.save(tensors, tmp_path / "a.bin")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    for name in ("a.bin", "old.pth", "a.safetensors"):
        result = read_tensors(tmp_path / name)
        assert result.keys() == tensors.keys() and all(torch.equal(result[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "empty", "text", "page", "cut", "cut late", "folder"])
def test_a_malformed_file_is_refused_by_name(tmp_path, name, fault):
    path = tmp_path / name
    if name.endswith("bin"):
        torch.save(copied(network()), path)
    else:
        safetensors.torch.save_file(copied(network()), path)
    content = path.read_bytes()
    path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                "page": b"<!DOCTYPE html><html><body>Access denied</body></html>",
                "cut": content[:50],
                "cut late": content[:-30],
            }[fault]
        )
    with pytest.raises(WeightsError) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@given(content=st.binary(max_size=40), ending=st.sampled_from(["bin", "safetensors"]))
def test_arbitrary_bytes_are_refused_by_name(tmp_path_factory, content, ending):
    path = tmp_path_factory.mktemp("bytes") / f"a.{ending}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=path.name):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"\x80\x02.", b"\x80\x02N.", b"\x80\x020.", b"\x80\x02h\x05.", b"\x80\x02}q\x00."])
def test_a_pickle_of_another_object_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(WeightsError, match="a.bin"):
        read_tensors(tmp_path / "a.bin")


@pytest.mark.parametrize("value", [[torch.ones(1)], torch.ones(1), 3, None], ids=["list", "tensor", "number", "none"])
def test_a_torch_file_without_a_dictionary_is_refused_by_name(tmp_path, value):
    torch.save(value, path := tmp_path / "a.bin")
    with pytest.raises(WeightsError, match="a.bin"):
        load_strictly(network(), read_tensors(path), path)


# Loading.


def test_matching_tensors_are_loaded():
    module, second = network(0), network(1)
    load_strictly(module, copied(second), Path("a.bin"))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_all_mismatches_are_reported_and_nothing_is_loaded():
    module, tensors = network(0), copied(network(1))
    before = copied(module)
    del tensors["0.weight"], tensors["1.running_mean"]
    tensors["2.weight"] = torch.zeros(2, 5)
    tensors |= {f"extra.{k}": torch.zeros(1) for k in range(5)}
    with pytest.raises(WeightsError) as caught:
        load_strictly(module, tensors, Path("models/a.bin"))
    message = str(caught.value)
    assert message.startswith("models/a.bin ") and "Sequential" in message
    assert "2 missing: 0.weight, 1.running_mean" in message
    assert "5 unexpected: extra.0, extra.1, extra.2, ..." in message
    assert "1 wrongly shaped: 2.weight (2, 5) instead of (2, 4)" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "unexpected", "wrongly shaped"])
def test_only_the_kind_of_mismatch_that_occurs_is_reported(change):
    module, tensors = network(0), copied(network(1))
    before = copied(module)
    if change == "missing":
        del tensors["2.bias"]
    else:
        tensors["2.bias" if change == "wrongly shaped" else "3.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError) as caught:
        load_strictly(module, tensors, Path("a.bin"))
    assert [word for word in ("missing", "unexpected", "wrongly shaped") if word in str(caught.value)] == [change]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_objects_other_than_tensors_are_skipped(tmp_path):
    """As in trainers' checkpoints: optimizer state, a shared list, NumPy values, options, a shared storage."""
    module, epochs = network(1), [1, 2]
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    beside = {
        "optimizer": optimizer.state_dict(),
        "epochs": epochs,
        "epochs_again": epochs,
        "best": np.float64(0.5),
        "curve": np.arange(3),
        "options": argparse.Namespace(output=Path("checkpoints"), rate=1e-4),
        "none": None,
    }
    tensors, tied = copied(module), module[0].weight
    for number, values in enumerate((tensors | beside, beside | {"state_dict": tensors, "tied": [tied, tied]})):
        for zipped in (True, False):
            path = tmp_path / f"{number}{zipped}.pth"
            torch.save(values, path, _use_new_zipfile_serialization=zipped)
            load_strictly(second := network(0), unwrap(read_tensors(path), path), path)
            assert fingerprint(second) == fingerprint(module)


def test_a_file_without_tensors_is_refused_with_its_keys(tmp_path):
    with pytest.raises(WeightsError, match="^a.pth holds no tensors by name, only unet, optimizer$"):
        load_strictly(network(), {"unet": copied(network()), "optimizer": {}}, Path("a.pth"))
    torch.save({"state_dict": torch.ones(1)}, path := tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="holds no weights by name, but a Tensor"):
        unwrap(read_tensors(path), path)


def test_a_torchscript_program_is_recognised(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(path := tmp_path / "lipsync_expert.pth")
    with pytest.raises(WeightsError, match="lipsync_expert.pth is a TorchScript program, not weights"):
        read_tensors(path)


def test_a_class_that_is_not_allowed_is_refused_by_name(tmp_path):
    torch.save({"0.weight": torch.ones(1), "more": Fraction(1, 2)}, path := tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="a.pth .*it references fractions.Fraction"):
        read_tensors(path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_the_counter_of_a_batch_norm_may_be_missing(device):
    tensors = copied(network(1))
    del tensors["1.num_batches_tracked"]
    with torch.device(device):
        module = network(0)
    load_strictly(module, tensors, Path("a.pth"))
    assert module[1].num_batches_tracked == 0 and fingerprint(module) == fingerprint(network(1))
    del tensors["1.running_var"]
    with pytest.raises(WeightsError, match="1 missing: 1.running_var$"):
        load_strictly(network(0), tensors, Path("a.pth"))


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (torch.zeros(4, 3).to_sparse(), "1 missing: 0.weight"),
        (torch.zeros(4, 3, device="meta"), "1 missing: 0.weight"),
        (None, "1 missing: 0.weight"),
        (torch.zeros(4, 3, dtype=torch.int64), "1 not floating point: 0.weight torch.int64"),
        (torch.zeros(4, 3, dtype=torch.complex64), "1 not floating point: 0.weight torch.complex64"),
    ],
    ids=["sparse", "meta", "none", "whole numbers", "complex numbers"],
)
def test_a_value_that_is_no_floating_point_tensor_is_refused(value, fault):
    module, tensors = network(0), copied(network(1)) | {"0.weight": value}
    before = copied(module)
    with pytest.raises(WeightsError) as caught:
        load_strictly(module, tensors, Path("a.bin"))
    assert str(caught.value).startswith("a.bin ") and fault in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("tensors", [None, 3, [], "0.weight"], ids=repr)
def test_a_value_that_is_no_dictionary_is_refused(tensors):
    with pytest.raises(WeightsError, match="^a.bin holds no weights by name"):
        load_strictly(network(), tensors, Path("a.bin"))


def test_a_network_on_the_meta_device_takes_over_the_tensors():
    with torch.device("meta"):
        empty = network()
    tensors = copied(network(1))
    load_strictly(empty, tensors, Path("a.bin"))
    assert all(tensor.data_ptr() == tensors[name].data_ptr() for name, tensor in empty.state_dict().items())


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


def test_fingerprint_does_not_depend_on_layout_or_order():
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3)
    before = fingerprint(first)
    assert fingerprint(first.to(memory_format=torch.channels_last)) == before
    flipped = nn.Module()
    flipped.register_parameter("bias", first.bias)
    flipped.register_parameter("weight", first.weight)
    assert fingerprint(flipped) == before


@pytest.mark.parametrize("name", list(network().state_dict()))
def test_any_changed_value_changes_the_fingerprint(name):
    module = network()
    before = fingerprint(module)
    assert before == fingerprint(network()) and len(before) == 16
    module.state_dict()[name].view(-1)[-1:].add_(1)
    assert fingerprint(module) != before


def test_fingerprint_depends_on_names():
    assert fingerprint(nn.ModuleDict({"a": nn.ReLU(), "b": (first := nn.Linear(2, 2))})) != fingerprint(
        nn.ModuleDict({"c": first})
    )
