"""Malicious pickles: nothing in them is executed, and what is not a tensor is skipped or refused by name."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_hostile_files import refusal

from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.models.unet import load_unet
from musetalk.models.weights import IgnoredGlobal, read_tensors
from musetalk.training.checkpoint import load_latest_state

LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
CPU = torch.device("cpu")


# Pickles, piece by piece.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def named(name: str) -> bytes:
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def storage(count: int = 4, kind: str = "FloatStorage", key: str = "0", more: bytes = b"") -> bytes:
    return b"(" + text("storage") + named(f"torch.{kind}") + text(key) + text("cpu") + number(count) + more + b"tQ"


def tensor(stored: bytes = storage(), start: int = 0, size: tuple = (4,), stride: tuple = (1,)) -> bytes:
    hooks = call("collections.OrderedDict")
    rest = number(start) + numbers(*size) + numbers(*stride) + b"\x89" + hooks
    return call("torch._utils._rebuild_tensor_v2", stored, rest)


def dictionary(*items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(items) + b"u."


def zipped(content: bytes, method: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A torch file of a pickle and of records (default: a storage of 16 bytes)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/version", "3\n")
        for name, data in (records or {"0": bytes(16)}).items():
            archive.writestr(f"a/data/{name}", data)
        for entry in archive.filelist:
            entry.external_attr = 0  # as torch writes it
    return buffer.getvalue()


def legacy(content: bytes) -> bytes:
    """A torch file in the legacy format."""
    return LEGACY + content + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)


def saved(value: object, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def read(path: Path, content: bytes) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return read_tensors(path)


def test_the_assembled_files_are_readable(tmp_path):
    content = dictionary(text("a"), tensor())
    assert read(tmp_path / "a.pt", zipped(content))["a"].tolist() == [0, 0, 0, 0]
    old = legacy(dictionary(text("a"), tensor(storage(more=b"N"))))
    assert read(tmp_path / "b.pt", old)["a"].tolist() == [0, 0, 0, 0]


# Code: one payload for each way that a pickle has to call a function.


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def harmful(trap: Path) -> dict[str, bytes]:
    """Pickles that would create the file if executed."""
    touch = text(f"touch {trap}")
    return {
        "REDUCE": call("os.system", touch),
        "builtin": call("builtins.eval", text(f"open({str(trap)!r}, 'w')")),
        "NEWOBJ": named("subprocess.Popen") + b"(" + touch + b"t\x81",
        "a function of torch": call("torch._tensor._rebuild_from_type_v2", named("os.system"), b"N", touch, b"}"),
        "INST": b"(" + touch + b"ios\nsystem\n",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + touch + b"tR",
        "BUILD": call("collections.OrderedDict") + b"}" + text("__setstate__") + named("os.system") + b"sb",
        "EXT": b"\x82\x01(" + touch + b"tR",
        "storage": b"(" + text("storage") + call("os.system", touch) + text("0") + text("cpu") + number(4) + b"tQ",
    }


@pytest.mark.parametrize("way", harmful(Path()))
@pytest.mark.parametrize("container", [zipped, legacy], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, way, container):
    trap, path = tmp_path / "trap", tmp_path / "unet.pth"
    content = container(dictionary(text("a"), harmful(trap)[way]))
    assert "weights_only" not in refusal(lambda: read(path, content), str(path))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["whisper/tiny.pt", "training-state-0000001.pt", "unet.pth"])
def test_no_loader_executes_code(tmp_path, mini, name):
    trap = tmp_path / "trap"
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(saved({"step": Runs(open, str(trap), "w")}))
    readers = {
        "whisper/tiny.pt": lambda: load_audio_encoder(tmp_path, CPU),
        "unet.pth": lambda: load_unet(mini, path, True),
    }
    said = refusal(readers.get(name, lambda: load_latest_state(tmp_path)), str(path))
    assert "references io.open" in said and not trap.exists()


def test_ignored_globals_do_nothing(tmp_path):
    """A call of getattr on a tensor or on an IgnoredGlobal gives an IgnoredGlobal, not a method or a class."""
    method = call("builtins.getattr", tensor(), text("tolist"))
    module = call("builtins.getattr", call("argparse.Namespace"), text("__class__"))
    values = read(tmp_path / "a.pt", zipped(dictionary(text("a"), tensor(), text("b"), method, text("c"), module)))
    assert values["a"].tolist() == [0, 0, 0, 0]
    assert type(values["b"]) is type(values["c"]) is IgnoredGlobal and not hasattr(values["b"], "__dict__")


# Malformed tensors.


MALFORMED = {
    "a storage larger than its record": tensor(storage(10**6), size=(10**6,)),
    "a storage of 2**70 elements": tensor(storage(2**70)),
    "a size beyond the storage": tensor(size=(5,)),
    "a negative stride": tensor(stride=(-1,)),
    "no such record": tensor(storage(key="1")),
    "a truncated number": b"J\x00",
    "an unhashable key": b"N]N",
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_tensor_is_refused(tmp_path, content):
    path = tmp_path / "unet.pth"
    refusal(lambda: read(path, zipped(dictionary(text("a"), content))), str(path))
