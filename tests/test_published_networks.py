"""The networks of the losses and of blending: parameter names, shapes and files."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from musetalk.models.face_parser import BiSeNet, load_face_parser
from musetalk.models.lpips import VGG16, Heads, load_lpips
from musetalk.models.syncnet import (
    STABLE_SYNCNET_16,
    STABLE_SYNCNET_16_ATTENTION,
    StableSyncNet,
    Wav2LipSyncNet,
    load_syncnet,
)
from musetalk.models.syncnet.stable import EncoderConfig, StableConfig
from musetalk.models.weights import SIGNATURE_KEYS, WeightsError, load_strictly, unwrap

CPU = torch.device("cpu")
SMALL = StableConfig(
    resolution=16,
    visual_encoder=EncoderConfig(6, (32, 32, 64, 64, 256), ((1, 2), 2, 2, 2, 1), (0, 0, 0, 1, 0)),
    audio_encoder=EncoderConfig(1, (32, 32, 64, 64, 256), ((2, 1), 2, 2, (10, 1), 1), (0, 0, 0, 1, 0)),
)


def plain(config: StableConfig) -> StableConfig:
    """Returns the configuration without attention."""
    visual, audio = (
        replace(encoder, attn_blocks=(0,) * len(encoder.attn_blocks))
        for encoder in (config.visual_encoder, config.audio_encoder)
    )
    return replace(config, visual_encoder=visual, audio_encoder=audio)


@pytest.fixture(scope="module")
def colour() -> Wav2LipSyncNet:
    return Wav2LipSyncNet()


@pytest.fixture(scope="module")
def stable() -> StableSyncNet:
    torch.manual_seed(0)
    return StableSyncNet(SMALL)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def save(values: dict, folder: Path, name: str, **how) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save(values, folder / name, **how)


class TensorOf2017:
    """A tensor that is pickled as in torch 0.1, which wrote the published VGG16."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.parts = tensor.untyped_storage(), 0, tuple(tensor.shape), tensor.stride()

    def __reduce__(self):
        return torch._utils._rebuild_tensor, self.parts


class PicklerOf2017(pickle.Pickler):
    """Replaces storages by their numbers and keeps them."""

    def __init__(self, file) -> None:
        super().__init__(file, protocol=2)
        self.storages = []

    def persistent_id(self, value):
        if not isinstance(value, torch.UntypedStorage):
            return None
        self.storages.append(value)
        return "storage", torch.FloatStorage, str(len(self.storages)), "cpu", len(value) // 4, None


def save_as_of_2017(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        sizes = {"short": 2, "int": 4, "long": 4}
        system = {"protocol_version": 1001, "little_endian": sys.byteorder == "little", "type_sizes": sizes}
        for value in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(value, file, protocol=2)
        pickler = PicklerOf2017(file)
        pickler.dump({name: TensorOf2017(tensor) for name, tensor in tensors.items()})
        pickle.dump([str(number + 1) for number in range(len(pickler.storages))], file, protocol=2)
        for storage in pickler.storages:
            file.write(
                struct.pack("<q", len(storage) // 4) + bytes(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())
            )


# Names and shapes.


@pytest.mark.parametrize(
    "build, entries, parameters, shapes",
    [
        (
            Wav2LipSyncNet,
            217,
            16_435_072,
            {
                "face_encoder.0.conv_block.0.weight": (32, 15, 7, 7),
                "face_encoder.1.conv_block.0.weight": (64, 32, 5, 5),
                "face_encoder.16.conv_block.0.weight": (512, 512, 1, 1),
                "face_encoder.13.conv_block.1.num_batches_tracked": (),
                "audio_encoder.0.conv_block.0.bias": (32,),
                "audio_encoder.12.conv_block.0.weight": (512, 256, 3, 3),
                "audio_encoder.13.conv_block.1.running_var": (512,),
            },
        ),
        (
            lambda: StableSyncNet(STABLE_SYNCNET_16),
            178,
            371_766_496,
            {
                "visual_encoder.conv_in.weight": (64, 48, 3, 3),
                "visual_encoder.down_blocks.7.downsample_conv.weight": (2048, 2048, 3, 3),
                "visual_encoder.down_blocks.6.conv_shortcut.weight": (2048, 1024, 1, 1),
                "audio_encoder.down_blocks.4.conv1.weight": (512, 256, 3, 3),
                "audio_encoder.norm_out.bias": (2048,),
            },
        ),
        (
            lambda: StableSyncNet(STABLE_SYNCNET_16_ATTENTION),
            266,
            401_306_080,
            {
                "visual_encoder.down_blocks.5.attn.to_q.bias": (512,),
                "visual_encoder.down_blocks.7.attn.to_out.0.weight": (1024, 1024),
                "audio_encoder.down_blocks.4.ff.net.0.proj.weight": (2048, 256),
                "audio_encoder.down_blocks.6.ff.net.2.weight": (512, 2048),
                "audio_encoder.down_blocks.6.conv_out.weight": (512, 512, 1, 1),
                "audio_encoder.down_blocks.6.norm3.weight": (512,),
            },
        ),
        (
            BiSeNet,
            191,
            13_300_416,
            {
                "cp.resnet.conv1.weight": (64, 3, 7, 7),
                "cp.resnet.layer4.0.downsample.0.weight": (512, 256, 1, 1),
                "cp.arm32.bn_atten.running_mean": (128,),
                "cp.conv_avg.conv.weight": (128, 512, 1, 1),
                "ffm.conv1.weight": (64, 256, 1, 1),
                "conv_out.conv_out.weight": (19, 256, 1, 1),
                "conv_out16.conv.bn.num_batches_tracked": (),
                "conv_out32.conv_out.weight": (19, 64, 1, 1),
            },
        ),
        (
            VGG16,
            26,
            14_714_688,
            {"features.0.weight": (64, 3, 3, 3), "features.10.bias": (256,), "features.28.weight": (512, 512, 3, 3)},
        ),
        (Heads, 5, 1472, {"lin0.model.1.weight": (1, 64, 1, 1), "lin4.model.1.weight": (1, 512, 1, 1)}),
    ],
    ids=["colour", "stable", "stable with attention", "parser", "vgg", "heads"],
)
def test_a_network_has_the_published_size_names_and_shapes(build, entries, parameters, shapes):
    with torch.device("meta"):
        network = build()
    own = network.state_dict()
    assert len(own) == entries and sum(weight.numel() for weight in network.parameters()) == parameters
    assert shapes.items() <= {name: tuple(tensor.shape) for name, tensor in own.items()}.items()


def test_the_size_of_the_used_part_of_the_parser_is_the_published_one():
    """148 of 191 tensors are used, 52,650,752 bytes, according to a public inventory of 79999_iter.pth."""
    with torch.device("meta"):
        own = BiSeNet().state_dict()
    unused = ("conv_out16", "conv_out32")
    kept = [x for name, x in own.items() if not name.startswith(unused) and x.is_floating_point()]
    assert len(kept) == 148 and sum(x.nbytes for x in kept) == 52_650_752


@pytest.mark.parametrize(
    "build, frames, mel_frames, size, width",
    [
        (Wav2LipSyncNet, 5, 16, 96, 512),
        (lambda: StableSyncNet(STABLE_SYNCNET_16), 16, 52, 256, 2048),
        (lambda: StableSyncNet(STABLE_SYNCNET_16_ATTENTION), 16, 52, 256, 2048),
    ],
    ids=["colour", "stable", "stable with attention"],
)
def test_window_size_of_the_sync_experts(build, frames, mel_frames, size, width):
    with torch.device("meta"), torch.no_grad():
        network = build()
        assert (network.frames, network.mel_frames, network.image_size) == (frames, mel_frames, size)
        output = network(torch.empty(3, frames, 3, 256, 256), torch.empty(3, mel_frames, 80))
    assert [tuple(x.shape) for x in output] == [(3, width)] * 2


# Files.


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
def test_wav2lips_training_checkpoint_is_loaded_exactly(tmp_path, colour, zipped):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=1e-4)
    weight.sum().backward()
    optimizer.step()
    values = {
        "state_dict": nn.DataParallel(colour).state_dict(),
        "optimizer": optimizer.state_dict(),
        "global_step": 10,
        "global_epoch": 2,
    }
    assert "module.face_encoder.0.conv_block.0.weight" in values["state_dict"]
    save(values, tmp_path, "syncnet/lipsync_expert.pth", _use_new_zipfile_serialization=zipped)
    network = load_syncnet(tmp_path, "syncnet/lipsync_expert.pth", CPU)
    assert same(network, colour)
    assert not network.training and not any(x.requires_grad for x in network.parameters())


@pytest.mark.parametrize("name", ["latentsync_syncnet", "stable_syncnet"])
def test_latentsyncs_checkpoint_is_loaded_exactly_with_a_configuration(tmp_path, name, stable):
    values = {"state_dict": stable.state_dict(), "global_step": 3, "train_step_list": [1, 2, 3], "val_loss_list": [0.7]}
    save(values, tmp_path, f"syncnet/{name}.pt")
    (tmp_path / "syncnet" / f"{name}.json").write_text(json.dumps(asdict(SMALL)))
    network = load_syncnet(tmp_path, f"syncnet/{name}.pt", CPU)
    assert isinstance(network, StableSyncNet) and same(network, stable)
    coarse = load_syncnet(tmp_path, f"syncnet/{name}.pt", CPU, torch.bfloat16)
    pairs = zip(network.state_dict().values(), coarse.state_dict().values(), strict=True)
    assert all(torch.equal(exact.bfloat16(), rounded) for exact, rounded in pairs)


def test_the_parser_is_loaded_exactly(tmp_path):
    parser = BiSeNet()
    save(parser.state_dict(), tmp_path, "face-parse-bisent/79999_iter.pth")
    assert same(load_face_parser(tmp_path, CPU).network, parser)


def test_lpips_is_loaded_exactly_without_the_classifier_of_its_trunk(tmp_path):
    torch.manual_seed(0)
    trunk, heads = VGG16(), Heads()
    classifier = {f"classifier.{k}.{kind}": torch.ones(2) for k in (0, 3, 6) for kind in ("weight", "bias")}
    save_as_of_2017(trunk.state_dict() | classifier, tmp_path / "vgg/vgg16-397923af.pth")
    with pytest.raises(WeightsError, match="vgg/lpips.pth is missing"):
        load_lpips(tmp_path, CPU)
    save(heads.state_dict(), tmp_path, "vgg/lpips.pth")
    loaded = load_lpips(tmp_path, CPU)
    assert same(loaded.trunk, trunk) and same(loaded.heads, heads)
    coarse = load_lpips(tmp_path, CPU, torch.bfloat16)
    first, second = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert coarse(first, second).dtype == torch.float32
    torch.testing.assert_close(coarse(first, second), loaded(first, second), rtol=0.1, atol=1e-3)


def test_unwrap_removes_the_checkpoint_and_the_prefix():
    path, x = Path("a.pth"), torch.ones(1)
    assert unwrap({"a.module.b": x}, path) == {"a.module.b": x}
    assert unwrap({"module.a": x, "module.module.b": x}, path) == {"a": x, "module.b": x}
    assert unwrap({"module.a": x, "b": x}, path) == {"module.a": x, "b": x}
    assert unwrap({"state_dict": {"module.a": x}, "optimizer": None}, path) == {"a": x}


def test_a_stable_syncnet_of_the_other_kind_is_recognised(tmp_path, stable):
    bare = StableSyncNet(plain(SMALL))
    for network, config, what in ((stable, plain(SMALL), "with"), (bare, SMALL, "without")):
        save({"state_dict": network.state_dict()}, tmp_path, "syncnet/latentsync_syncnet.pt")
        (tmp_path / "syncnet/latentsync_syncnet.json").write_text(json.dumps(asdict(config)))
        with pytest.raises(WeightsError, match=f"missing.*unexpected.*looks like a StableSyncNet {what} attention$"):
            load_syncnet(tmp_path, "syncnet/latentsync_syncnet.pt", CPU)


def test_a_file_of_another_network_is_recognised(tmp_path):
    with torch.device("meta"):
        built = [
            *(Wav2LipSyncNet(1), StableSyncNet(plain(SMALL)), StableSyncNet(SMALL)),
            *(BiSeNet(), BiSeNet().cp.resnet, VGG16(), Heads()),
        ]
    for network, what in zip(built, SIGNATURE_KEYS.values(), strict=False):
        tensors = {name: torch.empty(()).expand(tensor.shape) for name, tensor in network.state_dict().items()}
        with pytest.raises(WeightsError, match=f"a.pth does not fit Linear: .* looks like {what}$"):
            load_strictly(nn.Linear(1, 1), tensors, Path("a.pth"))
    with pytest.raises(WeightsError) as caught:  # the right kind, cut
        load_strictly(Heads(), {"lin0.model.1.weight": torch.ones(1, 3, 1, 1)}, Path("a.pth"))
    message = str(caught.value)
    assert "4 missing" in message and "lin0.model.1.weight (1, 3, 1, 1) instead of (1, 64, 1, 1)" in message
    assert "looks like" not in message


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("audio_encoder") and c.update(audio_encoder={}), "audio_encoder.in_channels: Field required"),
        (lambda c: c["visual_encoder"].update(block_out_channels=[10] * 5), "block_out_channels.0: .*32"),
        (lambda c: c["visual_encoder"].update(attn_blocks=[0]), "same length"),
        (lambda c: c["visual_encoder"].update(in_channels=2), "3 per frame"),
        (lambda c: c["audio_encoder"].update(in_channels=2), "1 for mel"),
        (lambda c: c["audio_encoder"].update(downsample_factors=[16] * 5), "."),
        (lambda c: c.update(resolution=32), r"shape \(2, 1024\), those of mel \(2, 256\)"),
    ],
    ids=["missing", "groups", "length", "frames", "mel", "small", "widths"],
)
def test_an_invalid_configuration_is_refused_by_name(tmp_path, change, message):
    config = asdict(SMALL)
    change(config)
    save({}, tmp_path, "syncnet/stable_syncnet.pt")
    (tmp_path / "syncnet/stable_syncnet.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"stable_syncnet.json does not describe a StableSyncNet: .*{message}"):
        load_syncnet(tmp_path, "syncnet/stable_syncnet.pt", CPU)
