"""Broken weight files: archives, tensors that do not fit, random corruption. See test_hostile_files.py."""

from __future__ import annotations

import json
import struct
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from test_hostile_files import mutated, refusal, survive
from test_hostile_pickles import dictionary, read, saved, tensor, text, zipped
from torch import nn

from musetalk.models.trained_unet import read_unet_contract
from musetalk.models.weights import load_strictly, read_tensors

# Archives.


GOOD = dictionary(text("a"), tensor())
BROKEN_ARCHIVES = {
    "compressed": lambda: zipped(GOOD, zipfile.ZIP_LZMA, **{"0": bytes(10**6)}),
    "no pickle": lambda: zipped(GOOD).replace(b"data.pkl", b"date.pkl"),
    "no entries": lambda: b"PK\x05\x06" + bytes(18),
    "a directory elsewhere": lambda: zipped(GOOD)[:-6] + struct.pack("<IH", 2**31, 0),
    "cut": lambda: zipped(GOOD)[:-30],
}


@pytest.mark.parametrize("make", BROKEN_ARCHIVES.values(), ids=BROKEN_ARCHIVES)
def test_a_broken_archive_is_refused(tmp_path, make):
    path = tmp_path / "unet.pth"
    path.write_bytes(make())
    refusal(lambda: read_tensors(path), str(path))


# Readable files that do not fit.


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def fitting(**changes: object) -> dict:
    return dict(network().state_dict()) | {name.replace("_", "."): value for name, value in changes.items()}


UNFIT_VALUES = {
    "a number": lambda: 3.0,
    "integers": lambda: torch.zeros(4, 3, dtype=torch.int64),
    "complex": lambda: torch.zeros(4, 3, dtype=torch.complex64),
    "8 bits": lambda: torch.zeros(4, 3, dtype=torch.float8_e4m3fn),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(4, 3), 1.0, 0, torch.qint8),
    "sparse": lambda: torch.zeros(4, 3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3)] * 4),
    "meta": lambda: torch.zeros(4, 3, device="meta"),
    "transposed": lambda: torch.zeros(3, 4),
    "a dict": lambda: {"0.weight": torch.zeros(4, 3)},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", UNFIT_VALUES.values(), ids=UNFIT_VALUES)
def test_a_value_that_is_no_dense_floating_point_tensor_of_the_right_shape_is_refused(tmp_path, make):
    path = tmp_path / "unet.pth"
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    refusal(lambda: load_strictly(module, read(path, saved(fitting(**{"0_weight": make()}))), path), str(path))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("key", [0, None, "\n\x1b[2J", "\udcff"], ids=repr)
def test_an_unexpected_name_is_refused(tmp_path, key):
    path = tmp_path / "unet.pth"
    refusal(lambda: load_strictly(network(), read(path, saved(fitting() | {key: torch.zeros(1)})), path), str(path))


# Safetensors.


BROKEN_SAFETENSORS = {
    "empty": b"",
    "a length beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": struct.pack("<Q", 5) + b"what?",
    "a list": struct.pack("<Q", 3) + b"[1]",
}


@pytest.mark.parametrize("content", BROKEN_SAFETENSORS.values(), ids=BROKEN_SAFETENSORS)
def test_broken_safetensors_are_refused_as_weights(tmp_path, content):
    path = tmp_path / "unet-0000001.safetensors"
    path.write_bytes(content)
    refusal(lambda: read_tensors(path), str(path))
    refusal(lambda: read_unet_contract(path), str(path))


@pytest.mark.parametrize("value", ["", "[]", "null", "[" * 10**5], ids=lambda value: value[:9])
def test_a_malformed_contract_in_weights_is_refused(tmp_path, value):
    path = tmp_path / "unet-0000001.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"contract": value})
    refusal(lambda: read_unet_contract(path), str(path))


# Random corruption.


SMALL = fitting()


@settings(max_examples=10)
@given(content=mutated(saved(SMALL)) | mutated(saved(SMALL, old=True)))
def test_a_corrupted_torch_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("torch") / "unet.pth"
    survive(lambda: load_strictly(network(), read(path, content), path), str(path))


@settings(max_examples=10)
@given(content=mutated(safetensors.torch.save(SMALL, {"contract": json.dumps({"crop": "rigid"})})))
def test_corrupted_safetensors_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("safetensors") / "unet-0000001.safetensors"
    path.write_bytes(content)
    survive(lambda: load_strictly(network(), read_tensors(path), path), str(path))
    survive(lambda: read_unet_contract(path), str(path))
