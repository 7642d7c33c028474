"""Weight files from outside: archives that lie, tensors that fit no network, accidents. See test_hostile_files.py."""

from __future__ import annotations

import json
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_hostile_clips import HOSTILE_SAFETENSORS, safetensors_file
from test_hostile_files import HUGE, mutated, refusal, survive
from test_hostile_pickles import dictionary, legacy, read, saved, storage, tensor, text, zipped
from torch import nn

from musetalk.models.trained_unet import read_unet_contract
from musetalk.models.weights import load_strictly, read_tensors
from musetalk.training.checkpoint import load_latest_state

# Archives that lie.


def changed(content: bytes, name: bytes, offset: int, layout: str, *values: int) -> bytes:
    """The archive with other values in a file's entry of its directory, and in the file's own header."""
    content = bytearray(content)
    for mark, begins, named_at in ((b"PK\x01\x02", offset, 46), (b"PK\x03\x04", offset - 2, 30)):
        at = content.find(mark)
        while at >= 0:
            if content[at + named_at : at + named_at + len(name)] == name:
                struct.pack_into(layout, content, at + begins, *values)
            at = content.find(mark, at + 4)
    return bytes(content)


GOOD = dictionary(text("a"), tensor())
FLAGS, METHOD, SIZES = 8, 10, 20  # where these are in an entry of an archive's directory
LYING_ARCHIVES = {
    "bzip2": lambda: zipped(GOOD, zipfile.ZIP_BZIP2, **{"0": bytes(10**6)}),
    "lzma": lambda: zipped(GOOD, zipfile.ZIP_LZMA, **{"0": bytes(10**6)}),
    "encrypted": lambda: changed(zipped(GOOD), b"a/data.pkl", FLAGS, "<H", 1),
    "strongly encrypted": lambda: changed(zipped(GOOD), b"a/data.pkl", FLAGS, "<H", 65),
    "more than is there": lambda: changed(zipped(GOOD), b"a/data/0", SIZES, "<II", 10**9, 10**9),
    "more unpacked than packed": lambda: changed(zipped(GOOD), b"a/data/0", SIZES, "<II", 16, 10**9),
    "4 GB": lambda: changed(zipped(GOOD), b"a/data/0", SIZES, "<II", 2**32 - 1, 2**32 - 1),
    "a pickle of 4 GB": lambda: changed(zipped(GOOD), b"a/data.pkl", SIZES, "<II", 2**32 - 1, 2**32 - 1),
    "unknown method": lambda: changed(zipped(GOOD), b"a/data.pkl", METHOD, "<H", 77),
    "deflated, it says": lambda: changed(zipped(GOOD), b"a/data.pkl", METHOD, "<H", zipfile.ZIP_DEFLATED),
    "bzip2, it says": lambda: changed(zipped(GOOD), b"a/data.pkl", METHOD, "<H", zipfile.ZIP_BZIP2),
    "lzma, it says": lambda: changed(zipped(b"\x09\x04\x05\x00" + GOOD), b"a/data.pkl", METHOD, "<H", zipfile.ZIP_LZMA),
    "no pickle": lambda: zipped(GOOD).replace(b"data.pkl", b"date.pkl"),
    "no folder": lambda: zipped(GOOD).replace(b"a/data.pkl", b"aadata.pkl"),
    "TorchScript": lambda: zipped(GOOD).replace(b"a/version", b"a/constants.pkl"[:9]),
    "no archive but its mark": lambda: b"PK\x03\x04" + bytes(999),
    "nothing in it": lambda: b"PK\x05\x06" + bytes(18),
    "a directory elsewhere": lambda: zipped(GOOD)[:-6] + struct.pack("<IH", 2**31, 0),
    "65535 entries": lambda: zipped(GOOD)[:-14] + b"\xff\xff\xff\xff" + zipped(GOOD)[-10:],
    "other endian": lambda: zipped(GOOD).replace(b"little", b"middle"),
    "cut": lambda: zipped(GOOD)[:-30],
}


@pytest.mark.parametrize("make", LYING_ARCHIVES.values(), ids=LYING_ARCHIVES)
@pytest.mark.parametrize("name", ["unet.pth", "training-state-0000001.pt"])
def test_an_archive_that_lies_is_refused(tmp_path, name, make):
    path = tmp_path / name
    path.write_bytes(make())
    refusal((lambda: read_tensors(path)) if name == "unet.pth" else (lambda: load_latest_state(tmp_path)), str(path))


def test_many_entries_for_one_piece_of_an_archive_are_not_read_one_by_one(tmp_path):
    """A small file can so be read for hours."""
    with zipfile.ZipFile(tmp_path / "training-state-0000001.pt", "w") as archive:
        archive.writestr("a/data.pkl", bytes(10**5))
        archive.filelist[0].external_attr = 0
        archive.filelist += archive.filelist * 99
    (tmp_path / "unet.pth").write_bytes((tmp_path / "training-state-0000001.pt").read_bytes())
    assert "it holds more than its size" in refusal(lambda: load_latest_state(tmp_path), str(tmp_path))
    refusal(lambda: read_tensors(tmp_path / "unet.pth"), str(tmp_path / "unet.pth"))


def test_an_archive_of_many_entries_is_read_by_those_that_count(tmp_path):
    more = {"0": bytes(16)} | {f"x{index}": b"" for index in range(5000)}
    assert read(tmp_path / "a.pt", zipped(GOOD, **more))["a"].shape == (4,)


# What is read but does not fit.


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def fitting(**changes: object) -> dict:
    return dict(network().state_dict()) | {name.replace("_", "."): value for name, value in changes.items()}


ODD_TENSORS = {
    "a number": lambda: 3.0,
    "none": lambda: None,
    "text": lambda: "x" * 10**6,
    "a list": lambda: [[0.0] * 3] * 4,
    "an array": lambda: np.zeros((4, 3), np.float32),
    "whole numbers": lambda: torch.zeros(4, 3, dtype=torch.int64),
    "truth": lambda: torch.zeros(4, 3, dtype=torch.bool),
    "complex": lambda: torch.zeros(4, 3, dtype=torch.complex64),
    "8 bits": lambda: torch.zeros(4, 3, dtype=torch.float8_e4m3fn),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(4, 3), 1.0, 0, torch.qint8),
    "sparse": lambda: torch.zeros(4, 3).to_sparse(),
    "compressed rows": lambda: torch.eye(4, 3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3)] * 4),
    "meta": lambda: torch.zeros(4, 3, device="meta"),
    "huge meta": lambda: torch.zeros(10**9, 10**6, device="meta"),
    "expanded": lambda: torch.zeros(1).expand(4, 3),
    "huge expanded": lambda: torch.zeros(1).expand(10**9, 10**9),
    "no size": lambda: torch.tensor(0.0),
    "turned": lambda: torch.zeros(3, 4),
    "one size more": lambda: torch.zeros(1, 4, 3),
    "no element": lambda: torch.zeros(0, 3),
    "a dict": lambda: {"0.weight": torch.zeros(4, 3)},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", ODD_TENSORS.values(), ids=ODD_TENSORS)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_what_is_no_plain_tensor_of_the_right_shape_is_refused(tmp_path, make, old):
    path = tmp_path / "unet.pth"
    if make is ODD_TENSORS["expanded"]:
        make = lambda: torch.zeros(1).expand(400, 300)  # noqa: E731 - more than the file's own words take
    module, before = network(), {}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    refusal(lambda: load_strictly(module, read(path, saved(fitting(**{"0_weight": make()}), old)), path), str(path))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "key",
    [0, 1.5, None, (), b"x", True, ("a",) * 9, "\n\x1b[2J", "x" * 10**5, "\udcff"],
    ids=lambda key: repr(key)[:12],
)
def test_a_name_that_is_none_of_the_networks_is_refused(tmp_path, key):
    path = tmp_path / "unet.pth"
    refusal(lambda: load_strictly(network(), read(path, saved(fitting() | {key: torch.zeros(1)})), path), str(path))


@pytest.mark.parametrize("value", [None, 3, "x", [], torch.zeros(3), OrderedDict(), {"a": {"b": {}}}], ids=repr)
def test_a_value_that_is_no_state_is_refused(tmp_path, value):
    path = tmp_path / "unet.pth"
    refusal(lambda: load_strictly(network(), read(path, saved(value)), path), str(path))
    refusal(lambda: load_strictly(network(), value, path), str(path))


# Safetensors.


@pytest.mark.parametrize("content", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused_as_weights(tmp_path, content):
    path = tmp_path / "unet-0000001.safetensors"
    path.write_bytes(content)
    refusal(lambda: read_tensors(path), str(path))
    refusal(lambda: read_unet_contract(path), str(path))


METADATA = [
    "",
    "{",
    "[]",
    "null",
    "NaN",
    "[" * 10**5,
    '{"a":' * 900 + "1" + "}" * 900,
    '"' + "x" * 10**6 + '"',
    "9" * 5000,
]


@pytest.mark.parametrize("value", METADATA, ids=lambda value: value[:9])
def test_a_contract_in_weights_that_is_none_is_refused(tmp_path, value):
    path = tmp_path / "unet-0000001.safetensors"
    header = {"__metadata__": {"contract": value}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    path.write_bytes(safetensors_file(header, bytes(4)))
    assert len(refusal(lambda: read_unet_contract(path), str(path))) < 1000


@pytest.mark.parametrize(
    "dtype", ["BOOL", "U8", "I8", "I16", "I32", "I64", "U64", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3"]
)
def test_safetensors_of_other_numbers_than_floats_of_16_bits_and_more_are_refused(tmp_path, dtype):
    bits = {"F4": 4, "F6_E2M3": 6, "BOOL": 8, "C64": 64}.get(dtype) or (8 if dtype.startswith("F8") else int(dtype[1:]))
    header = {"weight": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, 2 * bits]}}
    (path := tmp_path / "a.safetensors").write_bytes(safetensors_file(header, bytes(2 * bits)))
    refusal(lambda: load_strictly(nn.Linear(4, 4, bias=False), read_tensors(path), path), str(path))


# Accidents.


SMALL = fitting()


@given(content=mutated(saved(SMALL)) | mutated(saved(SMALL, old=True)) | mutated(zipped(GOOD)) | mutated(legacy(GOOD)))
def test_a_torch_file_with_accidents_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("torch") / "unet.pth"
    survive(lambda: load_strictly(network(), read(path, content), path), str(path))


@given(content=mutated(GOOD) | mutated(dictionary(text("a"), tensor(storage(more=b"N")))), old=st.booleans())
def test_a_pickle_with_accidents_is_read_or_refused(tmp_path_factory, content, old):
    path = tmp_path_factory.mktemp("torch") / "unet.pth"
    survive(lambda: load_strictly(network(), read(path, legacy(content) if old else zipped(content)), path), str(path))


@given(content=mutated(safetensors.torch.save(SMALL, {"contract": json.dumps({"crop": "rigid"})})))
def test_safetensors_with_accidents_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("safetensors") / "unet-0000001.safetensors"
    path.write_bytes(content)
    survive(lambda: load_strictly(network(), read_tensors(path), path), str(path))
    survive(lambda: read_unet_contract(path), str(path))


@given(
    numel=st.sampled_from((0, 3, 4, 5, -1, *HUGE[:4])),
    start=st.sampled_from((0, 1, -1, *HUGE[:4])),
    sizes=st.lists(
        st.tuples(st.sampled_from((0, 1, 2, 4, -1, *HUGE[:4])), st.sampled_from((0, 1, 4, -1, *HUGE[:4]))), max_size=4
    ),
    old=st.booleans(),
)
def test_a_tensor_of_any_numbers_takes_no_more_than_the_file(tmp_path_factory, numel, start, sizes, old):
    path = tmp_path_factory.mktemp("torch") / "unet.pth"
    stored = storage(numel, more=b"N" if old else b"")
    size, stride = zip(*sizes, strict=True) if sizes else ((), ())
    content = dictionary(text("a"), tensor(stored, start, size, stride))
    survive(lambda: read(path, legacy(content) if old else zipped(content)), str(path))
