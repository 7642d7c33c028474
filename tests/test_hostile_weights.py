"""Malicious and corrupted weight files: nothing in them is executed, and they are read or refused in one sentence."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hostile import corrupted, read_or_refuse, refusal
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from musetalk.data.face.dwpose import WEIGHTS, load_dwpose
from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.models.trained_unet import read_unet_contract
from musetalk.models.unet import load_unet
from musetalk.models.weights import IgnoredGlobal, load_strictly, read_tensors
from musetalk.training.checkpoint import load_latest_state

CPU = torch.device("cpu")
FORMATS = {"zip": True, "before zip": False}


class Call:
    """An object whose unpickling calls a function: `torch.save` writes it as the call that `torch.load` would make."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def torch_file(value: object, as_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


# Code.


@pytest.mark.parametrize("as_zip", FORMATS.values(), ids=FORMATS)
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, as_zip):
    trap, path = tmp_path / "trap", tmp_path / "unet.pth"
    for payload in (Call(os.system, f"touch {trap}"), Call(eval, f"open({str(trap)!r}, 'w')")):
        path.write_bytes(torch_file({"a": payload}, as_zip))
        message = refusal(lambda: read_tensors(path), str(path))
        assert "only tensors are loaded" in message and "weights_only" not in message  # torch recommends False
        assert not trap.exists()


def test_no_loader_executes_code(tmp_path, small_models):
    trap = tmp_path / "trap"
    readers = {
        WEIGHTS: lambda: load_dwpose(tmp_path, CPU),
        "whisper/tiny.pt": lambda: load_audio_encoder(tmp_path, CPU),
        "training-state-0000001.pt": lambda: load_latest_state(tmp_path),
        "unet.pth": lambda: load_unet(small_models, tmp_path / "unet.pth", True),
    }
    for name, read in readers.items():
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        path.write_bytes(torch_file({"step": Call(open, str(trap), "w")}))
        assert "io.open" in refusal(read, str(path)) and not trap.exists()


def test_ignored_globals_do_nothing(tmp_path):
    """A call of getattr in a file gives neither a method of a tensor nor a class."""
    path = tmp_path / "a.pt"
    tensor = torch.zeros(4)
    method, module = Call(getattr, tensor, "tolist"), Call(getattr, Path("a"), "__class__")
    path.write_bytes(torch_file({"a": tensor, "method": method, "class": module}))
    values = read_tensors(path)
    assert torch.equal(values["a"], tensor)
    assert type(values["method"]) is type(values["class"]) is IgnoredGlobal
    assert not hasattr(values["method"], "__dict__")


# Corruption.


@cache
def network_file(as_zip: bool) -> bytes:
    """A file of the network's weights, written once: torch's older format stores memory addresses, which vary."""
    return torch_file(network().state_dict(), as_zip)


@pytest.mark.parametrize("as_zip", FORMATS.values(), ids=FORMATS)
@given(data=st.data())
def test_a_corrupted_torch_file_is_read_or_refused(tmp_path_factory, as_zip, data):
    path = tmp_path_factory.mktemp("torch") / "unet.pth"
    path.write_bytes(data.draw(corrupted(network_file(as_zip))))
    read_or_refuse(lambda: load_strictly(network(), read_tensors(path), path), str(path))


@given(data=st.data())
def test_corrupted_safetensors_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("safetensors") / "unet-0000001.safetensors"
    content = safetensors.torch.save(network().state_dict(), {"contract": json.dumps({"crop": "rigid"})})
    path.write_bytes(data.draw(corrupted(content)))
    read_or_refuse(lambda: load_strictly(network(), read_tensors(path), path), str(path))
    read_or_refuse(lambda: read_unet_contract(path), str(path))


@pytest.mark.parametrize("key", [0, "\n\x1b[2J", "\udcff"], ids=repr)
def test_an_unprintable_name_is_escaped_in_the_message(tmp_path, key):
    path = tmp_path / "unet.pth"
    path.write_bytes(torch_file(network().state_dict() | {key: torch.zeros(1)}))
    refusal(lambda: load_strictly(network(), read_tensors(path), path), str(path))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the prototype of nested tensors
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 3, dtype=torch.float8_e4m3fn),
        lambda: torch.quantize_per_tensor(torch.zeros(4, 3), 1.0, 0, torch.qint8),
        lambda: torch.zeros(4, 3).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(3)] * 4),
        lambda: torch.zeros(4, 3, device="meta"),
        lambda: {"0.weight": torch.zeros(4, 3)},
    ],
    ids=["8 bits", "quantised", "sparse", "nested", "meta", "a dictionary"],
)
def test_a_value_that_is_not_a_dense_floating_point_tensor_is_refused(tmp_path, make):
    path = tmp_path / "unet.pth"
    path.write_bytes(torch_file(network().state_dict() | {"0.weight": make()}))
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    refusal(lambda: load_strictly(module, read_tensors(path), path), str(path))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
