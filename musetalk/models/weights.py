"""Reading, writing and strict loading of weight files. Nothing in a file is executed."""

from __future__ import annotations

import hashlib
import pickle
import re
import shlex
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from typing import TypeVar

import safetensors.torch
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn

from musetalk.errors import UserError
from musetalk.files import atomic_write, read_json
from musetalk.models.sources import SOURCES

Network = TypeVar("Network", bound=nn.Module)

# A tensor name that occurs only in this kind of file -> the kind, for error messages.
SIGNATURE_KEYS = {
    "face_encoder.0.conv_block.0.weight": "Wav2Lip's SyncNet",
    "audio_encoder.down_blocks.4.conv1.weight": "a StableSyncNet without attention",
    "audio_encoder.down_blocks.4.attn.to_q.weight": "a StableSyncNet with attention",
    "netcnnaud.0.weight": "SyncNet v2",
    "Mixed_5b.branch1x1.conv.weight": "an Inception",
    "cp.resnet.conv1.weight": "the face parser",
    "layer1.0.conv1.weight": "a ResNet",
    "features.0.weight": "VGG",
    "lin0.model.1.weight": "the LPIPS heads",
    "encoder.conv_in.weight": "a VAE",
    "backbone.stem.0.conv.weight": "DWPose's network",
    "time_embedding.linear_1.weight": "a UNet",
}

# What Python, torch and diffusers raise on malformed files and configurations.
LOAD_ERRORS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
PICKLE_ERRORS = (*LOAD_ERRORS, EOFError, MemoryError, struct.error)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What trainers store next to tensors: mmengine's log and settings, NumPy scalars and arrays, options, paths. Each is
# replaced by an IgnoredGlobal on loading. Files that reference any other class or function are refused.
IGNORED_GLOBALS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *("mmengine.config.config.Config", "mmengine.config.config.ConfigDict"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.ndarray", "numpy.dtype", "builtins.getattr", "builtins.bytes"),
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
    "argparse.Namespace",
)


class IgnoredGlobal:
    """Replaces a class or function of `IGNORED_GLOBALS`. Accepts any arguments and state, and ignores them."""

    __slots__ = ()

    def __new__(cls, *_: object) -> IgnoredGlobal:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class WeightsError(UserError):
    """A weight file is missing or unsuitable."""


def find(models_dir: Path, *names: str) -> Path:
    """Returns the path of the first existing file of a models folder among `names`, which are keys of `SOURCES`.

    Raises WeightsError with path and source of the first if none exists.
    """
    for path in (Path(models_dir) / name for name in names):
        if path.is_file():
            return path
    name, path, source = names[0], Path(models_dir) / names[0], SOURCES[names[0]]
    option = "" if Path(models_dir) == Path("models") else f" --models-dir {shlex.quote(str(models_dir))}"
    command = "" if source.look_for else f", or run python -m musetalk.download {name}{option}"
    raise WeightsError(f"{path} is missing; get it from {source} and put it there{command}")


def read_tensors(path: Path) -> dict:
    """Reads a .safetensors or a torch file, the latter with weights_only=True.

    Returns the contents, in which an IgnoredGlobal replaces each object of a class of `IGNORED_GLOBALS`. Raises
    WeightsError if the file is not readable, references any other class or function, or holds no dictionary.
    """
    unreadable = f"{path} cannot be read as weights"
    replacements = torch.serialization.safe_globals([(IgnoredGlobal, name) for name in IGNORED_GLOBALS])
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with replacements, warnings.catch_warnings(action="ignore"):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message recommends weights_only=False
        name = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"it references {name[1]}, but only tensors are loaded" if name else "it is not a pickle of tensors"
        raise WeightsError(f"{unreadable}: {fault}; use a file that holds only tensors") from error
    except (OSError, SafetensorError, *PICKLE_ERRORS) as error:
        if isinstance(error, RuntimeError) and "TorchScript" in str(error):
            raise WeightsError(f"{path} is a TorchScript program, not weights; use its state_dict instead") from error
        raise WeightsError(f"{unreadable}: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no weights by name, but a {type(values).__name__}")
    return values


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a .safetensors file atomically. Raises WeightsError if writing fails.

    metadata: at most one key, since safetensors writes several in random order.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        try:
            safetensors.torch.save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise WeightsError(f"{path} cannot be written: {error}") from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message. torch's continues with a stack trace."""
    return str(error).partition("\n")[0] or type(error).__name__


def build_network(kind: type[ModelMixin], path: Path, check: Callable[[ModelMixin], None]) -> ModelMixin:
    """Builds a network from a diffusers configuration file on the meta device.

    check: runs the network on the meta device and raises ValueError if the output is wrong. Raises WeightsError if the
    file does not describe such a network.
    """
    config = read_json(path)
    fault = f"{path} does not describe a usable {kind.__name__}"
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise WeightsError(f"{fault}: its _class_name is {short(config['_class_name'])}")
    try:
        with torch.device("meta"), torch.no_grad():
            network = kind.from_config(config)
            check(network)
    except LOAD_ERRORS as error:
        raise WeightsError(f"{fault}: {first_line(error)}") from error
    return network


def unwrap(values: dict, path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors by name of a trainer's checkpoint ({"state_dict": ...}) or a plain file, without the prefix
    `module.` of DataParallel if all names have it. Raises WeightsError if there are no tensors."""
    tensors, prefix = _dense_tensors(values.get("state_dict", values), path), "module."
    wrapped = all(name.startswith(prefix) for name in tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()} if wrapped else tensors


def _dense_tensors(values: object, path: Path) -> dict[str, torch.Tensor]:
    """Returns the dense tensors of a dictionary by name. Raises WeightsError if there are none."""
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no weights by name, but a {type(values).__name__}")
    tensors = {
        str(name): value
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_nested)
    }
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name" + (f", only {_shorten(list(values))}" if values else ""))
    return tensors


def load_strictly(module: nn.Module, tensors: dict, path: Path) -> None:
    """Loads tensors into a module by name. A module on the meta device takes over the tensors themselves.

    Everything but dense tensors is skipped. A missing `num_batches_tracked` (absent from files older than torch 0.4.1,
    and used only in training) becomes 0. Raises WeightsError, with a list of all mismatches, before anything is loaded.
    """
    expected, tensors = module.state_dict(), _dense_tensors(tensors, path)
    counters = [name for name in expected.keys() - tensors.keys() if name.endswith("num_batches_tracked")]
    tensors |= {name: torch.zeros_like(expected[name], device="cpu") for name in counters}
    common = sorted(expected.keys() & tensors.keys())
    mismatches = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "wrongly shaped": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in common
            if tensors[name].shape != expected[name].shape
        ],
        "not floating point": [
            f"{name} {tensors[name].dtype}"
            for name in common
            if expected[name].is_floating_point() and tensors[name].dtype not in FLOATS
        ],
    }
    if any(mismatches.values()):
        report = "; ".join(f"{len(names)} {kind}: {_shorten(names)}" for kind, names in mismatches.items() if names)
        kinds = [kind for name, kind in SIGNATURE_KEYS.items() if name in tensors and name not in expected]
        hint = f"; it looks like {kinds[0]}" if kinds else ""
        raise WeightsError(f"{path} does not fit {type(module).__name__}: {report}{hint}")
    module.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in expected.values()))


def _shorten(names: list) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def freeze(module: Network) -> Network:
    """Switches a module to eval mode and turns off the gradients of its weights. Returns it."""
    return module.requires_grad_(False).eval()


def fingerprint(module: nn.Module) -> str:
    """Hashes a module's tensors as float32 by name: 16 hex digits, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
