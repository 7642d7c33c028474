"""Unfit configurations, Whisper checkpoints and training states are refused before they are used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_hostile_files import HUGE, anything, mutated, refusal, survive

from musetalk.contract import ALL_FIELDS, FeatureContract
from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.models.unet import UNet, build_unet
from musetalk.models.vae import load_vae
from musetalk.training.checkpoint import load_latest_state, save_state
from musetalk.training.run import resume
from musetalk.training.state import OPTIMIZERS, TrainState

CPU = torch.device("cpu")
MINI = Path(__file__).parents[1] / "models" / "mini"
CONTRACT = FeatureContract()
FILES = {
    "unet": "musetalk/musetalk.json",
    "vae": "sd-vae-ft-mse/config.json",
    "vae weights": "sd-vae-ft-mse/diffusion_pytorch_model.safetensors",
    "whisper": "whisper/tiny.pt",
}


def small_models(folder: Path, changed: str, content: bytes) -> Path:
    """A models folder that is the small one but for a file of `FILES`."""
    for name in FILES.values():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(MINI / name)
    (folder / FILES[changed]).unlink()
    (folder / FILES[changed]).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str, bytes], Path]:
    """A function: a file of `FILES` and other content -> a models folder."""
    return lambda changed, content: small_models(tmp_path_factory.mktemp("models"), changed, content)


def build(folder: Path, name: str) -> None:
    """Build the network of a configuration and use it as it will be used."""
    if name == "unet":
        unet = build_unet(folder, 0, True)
        with torch.no_grad():
            made = unet(torch.zeros(1, 8, 32, 32), torch.zeros(1, 50, unet.model.config.cross_attention_dim))
        assert made.shape == (1, 4, 32, 32)
    else:
        load_vae(folder, CPU, torch.float32)


def configuration(name: str, **changes: object) -> bytes:
    return json.dumps(json.loads((MINI / FILES[name]).read_text()) | changes).encode()


# Configurations.


UNFIT_CONFIGURATIONS = [
    ("unet", "block_out_channels", [7, 7, 7]),
    ("unet", "down_block_types", ["os.system"] * 3),
    ("unet", "cross_attention_dim", None),
    ("unet", "_class_name", "AutoencoderKL"),
    ("unet", "in_channels", 4),
    ("unet", "out_channels", 8),
    ("vae", "_class_name", "UNet2DConditionModel"),
    ("vae", "latent_channels", 8),
    *(("vae", "scaling_factor", value) for value in (0, -1, math.inf, math.nan, "1", None)),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "key", "value"), UNFIT_CONFIGURATIONS, ids=lambda value: repr(value)[:24])
def test_an_unfit_configuration_is_refused(models, name, key, value):
    folder = models(name, configuration(name, **{key: value}))
    refusal(lambda: build(folder, name), str(folder))


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("content", ["{}", "[]", "", '{"a": ' * 10**5])
def test_a_file_that_is_no_configuration_is_refused(models, name, content):
    folder = models(name, content.encode())
    refusal(lambda: build(folder, name), str(folder))


# Whisper.


@pytest.fixture(scope="module")
def whisper(models) -> Callable[[dict], Path]:
    """Returns a function that writes a models folder with another Whisper checkpoint."""
    checkpoint = torch.load(MINI / FILES["whisper"], weights_only=True)

    def make(**changes: object) -> Path:
        folder = models("whisper", b"")
        torch.save(checkpoint | changes, folder / FILES["whisper"])
        return folder

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"n_mels": 81},
        {"n_audio_ctx": 0},
        {"n_audio_state": 7},
        {"n_audio_state": "64"},
        {"n_audio_head": 0},
        {"n_audio_layer": 3},
        {"n_more": 1},
    ],
    ids=repr,
)
def test_dimensions_of_another_encoder_are_refused(whisper, changes):
    dims = torch.load(MINI / FILES["whisper"], weights_only=True)["dims"] | changes
    folder = whisper(dims=dims)
    refusal(lambda: load_audio_encoder(folder, CPU), str(folder / FILES["whisper"]))


@pytest.mark.parametrize("tensors", [None, [], {}, {"encoder.x": 3}, {"encoder.conv1.bias": []}], ids=repr)
def test_a_checkpoint_without_an_encoder_is_refused(whisper, tensors):
    folder = whisper(model_state_dict=tensors)
    refusal(lambda: load_audio_encoder(folder, CPU), str(folder / FILES["whisper"]))


# Training states.


class Training:
    """A training of a UNet of a few parameters, after one step."""

    def __init__(self, optimizer: str = "adamw") -> None:
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            in_channels=8,
            out_channels=4,
            block_out_channels=(4,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            norm_num_groups=2,
            cross_attention_dim=4,
        )
        unet = UNet(model, False)
        ema = {name: value.clone() for name, value in model.state_dict().items()}
        self.state = TrainState(unet, CONTRACT, OPTIMIZERS[optimizer](unet.parameters()), optimizer, ema)
        self.go_on()

    def go_on(self) -> None:
        for parameter in self.state.unet.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.state.optimizer.step()
        self.state.step += 1
        self.state.update_ema(0.5)
        with self.state.averaged():
            pass

    def saved(self, **changes: object) -> dict:
        return self.state.as_dict() | changes

    def resume(self, folder: Path) -> None:
        resume(self.state, folder)
        self.go_on()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_good_state_is_gone_on_from(tmp_path, optimizer):
    one, other = Training(optimizer), Training(optimizer)
    one.go_on()
    save_state(tmp_path, 2, one.saved(), keep=1)
    one.go_on()
    other.resume(tmp_path)
    assert other.state.step == 3
    assert all(
        torch.equal(a, b) for a, b in zip(one.state.unet.parameters(), other.state.unet.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
@pytest.mark.parametrize(
    "value",
    [None, -1, 10**20, 1.5, "x" * 10**5, [], {}, {3: 4}, [[[[[[[[[]]]]]]]]], torch.zeros(3), {"a": torch.zeros(3)}],
    ids=lambda v: repr(v)[:20],
)
@pytest.mark.parametrize("key", ["unet", "ema", "optimizer", "optimizer_name", "contract", "step"])
def test_a_state_with_something_else_in_it_is_refused(tmp_path, key, value):
    training = Training()
    state = training.saved()
    if key == "step":
        save_state(tmp_path, 1, state, keep=1)
        state = torch.load(tmp_path / "training-state-0000001.pt") | {"step": value}
        torch.save(state, tmp_path / "training-state-0000001.pt")
    else:
        save_state(tmp_path, 1, state | {key: value}, keep=1)
    refusal(lambda: training.resume(tmp_path), "training-state-0000001.pt")


@pytest.mark.parametrize(
    "groups",
    [None, [], [{}], [{"lr": "x"}], [{"params": [0] * 10**4, "betas": None, "lr": math.nan}]],
    ids=lambda v: repr(v)[:20],
)
def test_the_constants_of_a_run_are_its_own_whatever_its_state_says(tmp_path, groups):
    training, other = Training(), Training()
    optimizer = training.state.optimizer.state_dict() | {"param_groups": groups}
    save_state(tmp_path, 1, training.saved(optimizer=optimizer), keep=1)
    before = other.state.optimizer.state_dict()["param_groups"]
    other.resume(tmp_path)
    assert other.state.optimizer.state_dict()["param_groups"] == before


@settings(max_examples=25)
@given(data=st.data())
def test_a_state_with_accidents_is_gone_on_from_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    training = Training()
    path = save_state(folder, 1, training.saved(), keep=1)
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    survive(lambda: training.resume(folder), str(path))


@settings(max_examples=25)
@given(key=st.sampled_from(["unet", "ema", "optimizer", "optimizer_name", "contract"]), value=anything)
@example(key="contract", value=CONTRACT.as_dict(ALL_FIELDS) | {"bbox_shift": HUGE[0]})
def test_a_state_with_any_value_is_gone_on_from_or_refused(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("run")
    training = Training()
    save_state(folder, 1, training.saved(**{key: value}), keep=1)
    survive(lambda: training.resume(folder), str(folder))


@pytest.mark.parametrize(
    "name", ["training-state-" + "9" * 200 + ".pt", "training-state-\u0663.pt", "training-state-1.pt"]
)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02}."])
def test_a_state_of_any_name_without_content_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refusal(lambda: load_latest_state(tmp_path), str(tmp_path / name))
