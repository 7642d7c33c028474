"""Weight files: where they belong, where they come from, and how they are loaded: strictly, running nothing in them."""

from __future__ import annotations

import hashlib
import pickle
import re
import shlex
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

import safetensors.torch
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn

from musetalk.errors import UserError
from musetalk.files import atomic_write, read_json

HUGGING_FACE = "https://huggingface.co/{}/resolve/main/{}"


@dataclass(frozen=True)
class Source:
    """Where people get a weight file."""

    url: str  # of the file or, with `look_for`, of the page where people find it
    sha256: str = ""  # of the file, or its first digits; "" where it is not known
    size: int = 0  # bytes; 0 where it is not known
    look_for: str = ""

    def __str__(self) -> str:
        return f"{self.url} ({self.look_for})" if self.look_for else self.url


# Each file of a models folder -> where people get it.
SOURCES = {
    "musetalk/musetalk.json": Source(HUGGING_FACE.format("TMElyralab/MuseTalk", "musetalk/musetalk.json")),
    "musetalk/pytorch_model.bin": Source(
        HUGGING_FACE.format("TMElyralab/MuseTalk", "musetalk/pytorch_model.bin"),
        "0ee7d5ea03ea75d8dca50ea7a76df791e90633687a135c4a69393abfc0475ffe",
        3_400_076_549,
    ),
    "musetalk/cunet.bin": Source(
        "https://drive.google.com/drive/folders/1USuHLbs1ff3mFJ5QtJMAZxm_yWLwqYai",
        look_for="cunet.bin, MuseTalkTrainer's UNet",
    ),
    "musetalkV15/musetalk.json": Source(
        HUGGING_FACE.format("TMElyralab/MuseTalk", "musetalkV15/musetalk.json"),
        "5b6923aee04d71692e0e9846c471e0a4ea07a4f686d39545e472bd4ba17e1b47",
        748,
    ),
    "musetalkV15/unet.pth": Source(
        HUGGING_FACE.format("TMElyralab/MuseTalk", "musetalkV15/unet.pth"),
        "7ebf6c98c181e20838e4c0054e96e944ac60d5d692cc01db42839fe11b787007",
        3_400_074_924,
    ),
    "sd-vae-ft-mse/config.json": Source(HUGGING_FACE.format("stabilityai/sd-vae-ft-mse", "config.json")),
    "sd-vae-ft-mse/diffusion_pytorch_model.safetensors": Source(
        HUGGING_FACE.format("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors"),
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        334_643_276,
    ),
    "sd-vae-ft-mse/diffusion_pytorch_model.bin": Source(
        HUGGING_FACE.format("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.bin"),
        "1b4889b6b1d4ce7ae320a02dedaeff1780ad77d415ea0d744b476155c6377ddc",
        334_707_217,
    ),
    "whisper/tiny.pt": Source(
        "https://openaipublic.azureedge.net/main/whisper/models/"
        "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9/tiny.pt",
        "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9",
        75_572_083,
    ),
    "dwpose/dw-ll_ucoco_384.pth": Source(
        HUGGING_FACE.format("yzd-v/DWPose", "dw-ll_ucoco_384.pth"),
        "0d9408b13cd863c4e95a149dd31232f88f2a12aa6cf8964ed74d7d97748c7a07",
        406_878_486,
    ),
    # A copy: Wav2Lip's README no longer links the file, and its folder now holds TorchScript programs. Two public
    # download scripts state this sum, one for this copy and one for the authors' own link of 2020.
    "syncnet/lipsync_expert.pth": Source(
        HUGGING_FACE.format("camenduru/Wav2Lip", "checkpoints/lipsync_expert.pth"),
        "9b9936c721696446eeed353032cab242a8cf0eed8c46cde540366f6ae5493be5",
    ),
    "syncnet/latentsync_syncnet.pt": Source(
        HUGGING_FACE.format("ByteDance/LatentSync", "latentsync_syncnet.pt"),
        "38fa63bad3ed2332f647c40a5dc616cb0e233db8579f698f62af4c41965c4da5",
        1_488_019_828,
    ),
    "syncnet/stable_syncnet.pt": Source(
        HUGGING_FACE.format("ByteDance/LatentSync-1.5", "stable_syncnet.pt"),
        "dccc464554b85ed939ae5cf63000e5803d4b21d8c7dae2260544a10aeb1ac483",
        1_605_324_224,
    ),
    # A copy: its authors, zllrunning/face-parsing.PyTorch, have the same file on Google Drive.
    "face-parse-bisent/79999_iter.pth": Source(
        HUGGING_FACE.format("ManyOtherFunctions/face-parse-bisent", "79999_iter.pth"),
        "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
        53_289_463,
    ),
    "vgg/vgg16-397923af.pth": Source(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
    ),
    "vgg/lpips.pth": Source(
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        7_289,
    ),
}

# A tensor that only this file has -> what the file is.
SIGNATURE_KEYS = {
    "face_encoder.0.conv_block.0.weight": "Wav2Lip's SyncNet",
    "audio_encoder.down_blocks.4.conv1.weight": "a StableSyncNet without attention",
    "audio_encoder.down_blocks.4.attn.to_q.weight": "a StableSyncNet with attention",
    "cp.resnet.conv1.weight": "the face parser",
    "layer1.0.conv1.weight": "a ResNet",
    "features.0.weight": "VGG",
    "lin0.model.1.weight": "the heads of LPIPS",
    "encoder.conv_in.weight": "a VAE",
    "backbone.stem.0.conv.weight": "DWPose's network",
    "time_embedding.linear_1.weight": "a UNet",
}

# What Python, torch and diffusers let through where a file makes no sense.
LOAD_ERRORS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
PICKLE_ERRORS = (*LOAD_ERRORS, EOFError, MemoryError, struct.error)
MAX_LAYERS, MAX_PARAMETERS = 16, 4_000_000_000  # the largest network here has 850 million
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What trainers store beside tensors: mmengine's log and settings, NumPy's scalars and arrays, options, paths. Loading
# replaces each by a IgnoredGlobal; a file that asks for any other class or function is refused.
IGNORED_GLOBALS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *("mmengine.config.config.Config", "mmengine.config.config.ConfigDict"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.ndarray", "numpy.dtype", "builtins.getattr", "builtins.bytes"),
    *("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath"),
)


class IgnoredGlobal:
    """Replaces a class or function of `IGNORED_GLOBALS`: accepts any arguments and state, keeps and does nothing."""

    __slots__ = ()

    def __new__(cls, *_: object) -> IgnoredGlobal:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class WeightsError(UserError):
    """A weight file is missing or is not what it should be. The message names it and what to do."""


def find(models_dir: Path, *names: str) -> Path:
    """The path in a models folder of the first of some files that is there.

    Raises WeightsError naming place and source of the first, one of `SOURCES`, where none is.
    """
    for path in (Path(models_dir) / name for name in names):
        if path.is_file():
            return path
    name, path, source = names[0], Path(models_dir) / names[0], SOURCES[names[0]]
    folder = "" if Path(models_dir) == Path("models") else f" --models-dir {shlex.quote(str(models_dir))}"
    command = "" if source.look_for else f", which python -m musetalk.download {name}{folder} does"
    raise WeightsError(f"{path} is missing; get it from {source} and put it there{command}")


def read_tensors(path: Path) -> dict:
    """Reads a .safetensors or a torch file by torch's own guard, so that nothing in it is run.

    Returns what the file holds, with an IgnoredGlobal for each object of a class of `IGNORED_GLOBALS`. Raises
    WeightsError where it is no such file, asks for any other class or function, or holds no dictionary.
    """
    unreadable = f"{path} cannot be read as weights"
    stand_ins = torch.serialization.safe_globals([(IgnoredGlobal, name) for name in IGNORED_GLOBALS])
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with stand_ins, warnings.catch_warnings(action="ignore"):  # of what the errors below say
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its own message advises to switch the guard off
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}, but only tensors are loaded" if asked else "it is no pickle of tensors"
        raise WeightsError(f"{unreadable}: {what}; get a file of tensors alone") from error
    except (OSError, SafetensorError, *PICKLE_ERRORS) as error:
        if isinstance(error, RuntimeError) and "TorchScript" in str(error):
            raise WeightsError(f"{path} is a TorchScript program, not weights; get its state_dict instead") from error
        raise WeightsError(f"{unreadable}: {reason(error)}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no weights by name but a {type(values).__name__}")
    return values


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors, whole or not at all. Raises WeightsError where it cannot be written.

    metadata: one key at most, for several are written in any order.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        try:
            safetensors.torch.save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise WeightsError(f"{path} cannot be written: {error}") from error


def reason(error: Exception) -> str:
    """What others' errors begin with; torch's go on with a trace."""
    return str(error).partition("\n")[0] or type(error).__name__


def build_network(kind: type[ModelMixin], path: Path, use: Callable[[ModelMixin], None]) -> ModelMixin:
    """A network of a configuration file of diffusers, on the meta device: it takes no memory until it is filled.

    use: tries on the meta device what the network is for, and raises ValueError where that is not what comes out.
    Raises WeightsError where the file describes no such network, or one that is larger than any of these.
    """
    config = read_json(path)
    what = f"{path} describes no {kind.__name__} that can be used"
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise WeightsError(f"{what}: its _class_name is {short(config['_class_name'])}")
    for name, value in config.items():
        sizes = value if isinstance(value, list) else [value]
        shallow = all(size is None or (type(size) is int and size <= MAX_LAYERS) for size in sizes)
        if len(sizes) > MAX_LAYERS or ("layers" in name and not shallow):
            raise WeightsError(f"{what}: {name[:40]} is too large")
    try:
        with torch.device("meta"), torch.no_grad():
            network = kind.from_config(config)
            use(network)
    except LOAD_ERRORS as error:
        raise WeightsError(f"{what}: {reason(error)}") from error
    if (size := sum(parameter.numel() for parameter in network.parameters())) > MAX_PARAMETERS:
        raise WeightsError(f"{path} describes a network of {size:,} parameters, more than {MAX_PARAMETERS:,}")
    return network


def unwrap(values: dict, path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a trainer's checkpoint ({"state_dict": ...}) or of a plain file by name, without the
    `module.` that training on several devices puts before every name. Raises WeightsError where there are none."""
    tensors, prefix = _plain_tensors(values.get("state_dict", values), path), "module."
    wrapped = all(name.startswith(prefix) for name in tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()} if wrapped else tensors


def _plain_tensors(values: object, path: Path) -> dict[str, torch.Tensor]:
    """Returns the dense tensors of a dictionary by name, without whatever else is in it. Raises WeightsError where it
    has none."""
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no weights by name but a {type(values).__name__}")
    tensors = {
        str(name): value
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_nested)
    }
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name" + (f", only {_first(list(values))}" if values else ""))
    return tensors


def load_strictly(module: nn.Module, tensors: dict, path: Path) -> None:
    """Loads tensors into a module by name; a module on the meta device takes the tensors themselves.

    What is no dense tensor is skipped. A missing `num_batches_tracked`, which files of before torch 0.4.1 lack and only
    training uses, becomes 0. Raises WeightsError listing what does not fit; then nothing was loaded.
    """
    own, tensors = module.state_dict(), _plain_tensors(tensors, path)
    counters = [name for name in own.keys() - tensors.keys() if name.endswith("num_batches_tracked")]
    tensors |= {name: torch.zeros_like(own[name], device="cpu") for name in counters}
    faults = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "wrongly shaped": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if tensors[name].shape != own[name].shape
        ],
        "not of floating point": [
            f"{name} {tensors[name].dtype}"
            for name in sorted(own.keys() & tensors.keys())
            if own[name].is_floating_point() and tensors[name].dtype not in FLOATS
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {_first(names)}" for fault, names in faults.items() if names)
        other = [what for sign, what in SIGNATURE_KEYS.items() if sign in tensors and sign not in own]
        raise WeightsError(
            f"{path} does not fit {type(module).__name__}: {listed}"
            + "".join(f"; it looks like {x}" for x in other[:1])
        )
    module.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in own.values()))


def _first(names: list) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def freeze(module: nn.Module) -> nn.Module:
    """The module in eval mode, none of its weights ever getting a gradient."""
    return module.requires_grad_(False).eval()


def fingerprint(module: nn.Module) -> str:
    """A short hash of a module's tensors as float32, by name: the same whatever file format they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
