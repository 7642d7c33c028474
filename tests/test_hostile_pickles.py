"""Pickles from outside: nothing in them is run, nothing is made that the file could not fill, none takes for ever."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_hostile_files import refusal
from torch import nn

from musetalk.checkpoint import load_latest_state
from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.models.unet import load_unet
from musetalk.weights import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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
    """A torch file of a pickle, and of one storage of 16 bytes unless others are given."""
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


def legacy(content: bytes, keys: list[str] | None = None, data: bytes = struct.pack("<q", 4) + bytes(16)) -> bytes:
    """A torch file of the format before zip."""
    return LEGACY + content + pickle.dumps(["0"] if keys is None else keys, 2) + data


def saved(value: object, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def read(path: Path, content: bytes) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return read_tensors(path)


def test_the_pieces_make_files_that_are_read(tmp_path):
    content = dictionary(text("a"), tensor())
    assert read(tmp_path / "a.pt", zipped(content))["a"].tolist() == [0, 0, 0, 0]
    old = legacy(dictionary(text("a"), tensor(storage(more=b"N"))))
    assert read(tmp_path / "b.pt", old)["a"].tolist() == [0, 0, 0, 0]


# Code.


class Runs:
    """Unpickling it would call a function."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Module(nn.Module):
    """A network that would do so."""

    def __init__(self, inner: object) -> None:
        super().__init__()
        self.inner = inner

    def __reduce__(self):
        return self.inner.call


def harmful(trap: Path) -> dict[str, bytes]:
    """Pickles that would make the file."""
    touch, code = text(f"touch {trap}"), text(f"open({str(trap)!r}, 'w')")
    return {
        "os.system": call("os.system", touch),
        "posix.system": call("posix.system", touch),
        "eval": call("builtins.eval", code),
        "eval of Python 2": call("__builtin__.eval", code),
        "exec": call("builtins.exec", code),
        "open": call("io.open", text(str(trap)), text("w")),
        "subprocess": call("subprocess.getoutput", touch),
        "getattr": call("builtins.getattr", named("os.system"), text("__call__")),
        "runpy": call("runpy._run_code", code, b"}"),
        "a name in a name": named("torch._utils.os.system") + b"(" + touch + b"tR",
        "a function of torch's": call("torch._tensor._rebuild_from_type_v2", named("os.system"), b"N", touch, b"}"),
        "INST": b"(" + touch + b"ios\nsystem\n",
        "OBJ": b"(" + named("os.system") + touch + b"o",
        "NEWOBJ": named("subprocess.Popen") + b"(" + touch + b"t\x81",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + touch + b"tR",
        "BUILD": call("collections.OrderedDict") + b"}" + text("__setstate__") + named("os.system") + b"sb",
        "EXT": b"\x82\x01(" + touch + b"tR",
        "storage kind": b"(" + text("storage") + call("os.system", touch) + text("0") + text("cpu") + number(4) + b"tQ",
    }


def tar_of(content: bytes) -> bytes:
    """torch's first format."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(info := tarfile.TarInfo(name), io.BytesIO(content))
            info.size = len(content)
    return buffer.getvalue()


CONTAINERS = {
    "zip": zipped,
    "legacy": legacy,
    "plain": lambda content: content,
    "tar": tar_of,
    "legacy mark": lambda content: content + legacy(b"\x80\x02}."),
    "legacy system": lambda content: LEGACY[: LEGACY.rindex(b"\x80")] + content + legacy(b"\x80\x02}.")[len(LEGACY) :],
    "legacy keys": lambda content: LEGACY + b"\x80\x02}." + content,
    "zip in capitals": lambda content: zipped(content).replace(b"a/data.pkl", b"a/DATA.PKL"),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("way", harmful(Path()))
def test_a_pickle_that_would_run_code_runs_none_in_any_container(tmp_path, way, container):
    trap = tmp_path / "trap"
    path = tmp_path / "unet.pth"
    content = container(dictionary(text("a"), harmful(trap)[way]))
    refusal(lambda: read(path, content), str(path))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["unet.pt", "unet.pth", "unet.bin", "unet", "unet.safetensors", "unet.SAFETENSORS"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [dict, Module], ids=["dict", "module"])
def test_a_value_that_would_run_code_runs_none_under_any_name(tmp_path, name, old, wrap):
    trap = tmp_path / "trap"
    value = Runs(open, str(trap), "w")
    content = saved({"a": Module(value) if wrap is Module else value}, old)
    path = tmp_path / name
    assert "weights_only" not in refusal(lambda: read(path, content), str(path))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["whisper/tiny.pt", "training-state-0000001.pt", "unet.pth"])
def test_no_reader_of_weights_runs_code(tmp_path, mini, name):
    trap = tmp_path / "trap"
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(saved({"step": Runs(open, str(trap), "w")}))
    readers = {
        "whisper/tiny.pt": lambda: load_audio_encoder(tmp_path, CPU),
        "unet.pth": lambda: load_unet(mini, path, True),
    }
    refusal(readers.get(name, lambda: load_latest_state(tmp_path)), str(path))
    assert not trap.exists()


# Bombs.


def deep(opening: bytes, closing: bytes, levels: int = 10**5) -> bytes:
    return b"\x80\x02" + opening * levels + closing * levels + b"."


BOMBS = {
    "bytearray": call("builtins.bytearray", number(10**13)),
    "bytearray of 2 GB": call("builtins.bytearray", number(2 * 10**9)),
    "Tensor": call("torch.Tensor", number(10**9)),
    "FloatTensor": call("torch.FloatTensor", number(10**9)),
    "storage": call("torch.storage.UntypedStorage", number(10**10)),
    "new tensor": named("torch.Tensor") + numbers(10**9) + b"\x81",
    "hex": named("_codecs.encode")
    + b"("
    + call("_codecs.encode", text("x" * 10**6), text("utf-32"))
    + text("hex")
    + b"tR",
    "sparse": call(
        "torch._utils._rebuild_sparse_tensor",
        call("torch.serialization._get_layout", text("torch.sparse_coo")),
        b"(" + tensor() + tensor() + numbers(10**12) + b"t",
    ),
    "meta": call(
        "torch._utils._rebuild_meta_tensor_no_storage", named("torch.float32"), numbers(10**12), numbers(1), b"\x89"
    ),
    "attributes": call(
        "torch._tensor._rebuild_from_type_v2",
        named("torch._utils._rebuild_tensor_v2"),
        named("torch.Tensor"),
        b"(" + storage() + number(0) + numbers(4) + numbers(1) + b"\x89N}t",
        b"}" + text("shape") + number(1) + b"s",
    ),
    "quantised": call(
        "torch._utils._rebuild_qtensor",
        storage(kind="QInt8Storage"),
        number(0),
        numbers(10**12),
        numbers(1),
        b"(" + named("torch.per_tensor_affine") + b"G" + bytes(8) + number(0) + b"t",
        b"\x89",
        b"}",
    ),
    "expanded": tensor(size=(10**6, 10**6), stride=(0, 0)),
    "numel beyond the record": tensor(storage(10**6), size=(10**6,)),
    "numel far beyond": tensor(storage(10**13), size=(10**13,)),
    "numel 2**62": tensor(storage(2**62)),
    "numel 2**70": tensor(storage(2**70)),
    "numel negative": tensor(storage(-4)),
    "numel no number": tensor(b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu") + b"NtQ"),
    "size beyond the storage": tensor(size=(5,)),
    "size far beyond": tensor(size=(10**12,)),
    "sizes overflow": tensor(size=(2**33, 2**33), stride=(1, 1)),
    "negative size": tensor(size=(-4,)),
    "negative stride": tensor(stride=(-1,)),
    "negative start": tensor(start=-1),
    "start beyond": tensor(start=1),
    "start 2**62": tensor(start=2**62),
    "start 2**70": tensor(start=2**70),
    "no such record": tensor(storage(key="1")),
    "a record of another folder": tensor(storage(key="../version")),
    "persistent number": number(3) + b"Q",
    "persistent nothing": b")Q",
    "persistent module": b"(" + text("module") + b"NNNNtQ",
    "half a number": b"J\x00",
    "memo of nothing": b"h\x07",
    "memo far away": b"}r\xff\xff\xff\xff" + b"j\xff\xff\xff\xff",
    "a list in itself": b"]q\x01h\x01a",
    "laughs": b"]q\x01"
    + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(1, 60)),
    "laughs as a key": b"N)q\x01"
    + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(1, 60)),
    "deep tuples as a key": b"N)" + b"\x85" * 10**6 + b"N",
    "deep lists": b"]" * 10**5 + b"a" * (10**5 - 1),
    "deep dicts": (b"}" + text("a")) * 10**5 + b"N" + b"s" * 10**5,
    "unhashable key": b"N]N",
    "mark without end": b"((((",
    "protocol 5": b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62),
    "long of 2**31": b"\x8b" + struct.pack("<i", 2**31 - 1),
}


@pytest.mark.parametrize("container", [zipped, legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_both_formats(tmp_path, bomb, container):
    path = tmp_path / "unet.pth"
    if container is legacy:
        bomb = bomb.replace(b"tQ", b"NtQ")  # where a storage's name says whether it is a part of another
    refusal(lambda: read(path, container(dictionary(text("a"), bomb))), str(path))


@pytest.mark.parametrize("numel", [10**3, 10**10, 10**13, 2**62, 2**70, -1])
@pytest.mark.parametrize("listed", [True, False])
def test_a_storage_of_the_old_format_larger_than_the_file_is_refused(tmp_path, numel, listed):
    """torch takes the memory before it reads, and does not ask for what no list names."""
    size = (max(1, min(numel, 2**60)),)
    content = dictionary(text("a"), tensor(storage(numel, more=b"N"), size=size))
    path = tmp_path / "unet.pth"
    refusal(lambda: read(path, legacy(content, None if listed else [], b"")), str(path))


def test_many_names_for_one_storage_are_refused(tmp_path):
    """Each would take its own memory as soon as the network is moved or made float32."""
    one = torch.zeros(10**5)
    path = tmp_path / "unet.pth"
    assert read(path, saved({"a": one}))["a"].shape == one.shape
    for values in ({str(key): one for key in range(100)}, {str(key): one.view(-1) for key in range(100)}):
        refusal(lambda values=values: read(path, saved(values)), str(path))
