"""Configurations, Whisper's dimensions and training states from outside: a network that cannot be used is refused
before it is built, a state that cannot be gone on from before it is taken over."""

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
from test_hostile_clips import HOSTILE_SAFETENSORS
from test_hostile_files import HUGE, NESTED, ODD, anything, mutated, refusal, survive

from musetalk.contract import ALL_FIELDS, FeatureContract
from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.models.trained_unet import load_trained_unet
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


KEYS = {name: list(json.loads((MINI / FILES[name]).read_text())) for name in ("unet", "vae")}
ODD_CONFIGURATIONS = [
    *(("unet", key, value) for key in KEYS["unet"] for value in (10**9, -1, "x", [[10**9]])),
    *(("vae", key, value) for key in KEYS["vae"] for value in (10**9, -1, "x", [[10**9]])),
    *(("unet", "layers_per_block", value) for value in (17, 1e9, True, 10**400, [10**9] * 3, [[10**9]] * 3, "9" * 9)),
    *(("unet", "transformer_layers_per_block", value) for value in (10**9, [10**9] * 3, [[10**9]] * 3, 1e9)),
    *(("unet", "reverse_transformer_layers_per_block", value) for value in (10**9, [[10**9]] * 3)),
    *(
        ("unet", "block_out_channels", value)
        for value in ([10**9] * 3, [8] * 10**5, [0, 0, 0], [7, 7, 7], [], [2**40] * 3)
    ),
    *(
        ("unet", "down_block_types", value)
        for value in (["os.system"] * 3, ["DownBlock2D"] * 10**5, "DownBlock2D", [1, 2, 3])
    ),
    *(("unet", "cross_attention_dim", value) for value in (10**9, 2**62, 0, None, [64, 64, 64], 2**14 + 1, 64.0)),
    *(("unet", "attention_head_dim", value) for value in (0, -4, [0, 0, 0], 10**9, 5)),
    *(
        ("unet", "_class_name", value)
        for value in ("AutoencoderKL", "DiffusionPipeline", "os.system", "utils", ["x"], None, "")
    ),
    *(("vae", "_class_name", value) for value in ("UNet2DConditionModel", "OnnxStableDiffusionPipeline", 3)),
    *(("unet", "in_channels", value) for value in (4, 9, 0, 10**12)),
    *(("unet", "out_channels", value) for value in (3, 8, 10**12)),
    *(("unet", "class_embed_type", value) for value in ("timestep", "projection", "x")),
    *(("unet", "addition_embed_type", value) for value in ("text", "text_image", "text_time", "image", "image_hint")),
    *(
        ("unet", "encoder_hid_dim_type", value)
        for value in ("text_proj", "text_image_proj", "image_proj", "ip_image_proj")
    ),
    *(("unet", key, 10**9) for key in ("num_class_embeds", "conv_in_kernel", "conv_out_kernel", "time_embedding_dim")),
    ("unet", "time_cond_proj_dim", 8),
    ("unet", "norm_eps", math.nan),
    ("unet", "act_fn", {"a": [[1]]}),
    ("unet", "quantization_config", {"load_in_8bit": True}),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Initializing zero-element")
@pytest.mark.parametrize(("name", "key", "value"), ODD_CONFIGURATIONS, ids=lambda value: repr(value)[:24])
def test_an_odd_configuration_makes_a_network_that_works_or_none(models, name, key, value):
    folder = models(name, configuration(name, **{key: value}))
    survive(lambda: build(folder, name), str(folder / "sd-vae-ft-mse" if name == "vae" else folder / FILES["unet"]))


@pytest.mark.parametrize("nested", NESTED, ids=["lists", "objects"])
@pytest.mark.parametrize(
    ("name", "key"), [("unet", "block_out_channels"), ("vae", "layers_per_block"), ("unet", "_class_name")]
)
def test_a_nested_configuration_is_refused(models, name, key, nested):
    folder = models(name, configuration(name, **{key: "PLACE"}).replace(b'"PLACE"', nested.encode()))
    refusal(lambda: build(folder, name), str(folder / FILES[name]))


@pytest.mark.parametrize(
    "value", [0, -1, math.inf, math.nan, "1", None, [1], 1e-300, 1e300, 10**400], ids=lambda v: repr(v)[:9]
)
def test_a_scale_of_latents_that_is_none_is_refused(models, value):
    """All that comes out would be nothing, or no number."""
    folder = models("vae", configuration("vae", scaling_factor=value))
    refusal(lambda: build(folder, "vae"), str(folder / FILES["vae"]))


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("content", ["{}", '{"_class_name": "UNet2DConditionModel"}', '{"a": 1}'])
def test_a_configuration_of_nothing_is_refused(models, name, content):
    """diffusers would take its own values for all, and the network would fit nothing here."""
    folder = models(name, content.encode())
    refusal(lambda: build(folder, name), str(folder))


def test_a_configuration_of_more_parameters_than_any_network_here_is_refused_before_it_takes_memory(models):
    folder = models("unet", configuration("unet", block_out_channels=[8000, 16000, 24000]))
    assert "parameters, more than" in refusal(lambda: build(folder, "unet"), str(folder / FILES["unet"]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@given(
    change=st.sampled_from(["unet", "vae"]).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(KEYS[name]), anything)
    )
)
def test_a_configuration_with_any_value_makes_a_network_that_works_or_none(models, change):
    name, key, value = change
    folder = models(name, configuration(name, **{key: value}))
    survive(lambda: build(folder, name), str(folder))


@given(data=st.data())
def test_a_configuration_with_accidents_makes_a_network_that_works_or_none(models, data):
    name = data.draw(st.sampled_from(["unet", "vae"]))
    folder = models(name, data.draw(mutated((MINI / FILES[name]).read_bytes())))
    survive(lambda: build(folder, name), str(folder))


@pytest.mark.parametrize("content", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS)
def test_hostile_safetensors_make_no_network(models, tmp_path, content):
    folder = models("vae weights", content)
    refusal(lambda: load_vae(folder, CPU, torch.float32), str(folder / FILES["vae weights"]))
    (tmp_path / "unet-0000001.safetensors").write_bytes(content)
    refusal(lambda: load_trained_unet(tmp_path / "unet-0000001.safetensors", MINI), str(tmp_path))


# Whisper.


@pytest.fixture(scope="module")
def whisper(models) -> Callable[[dict], Path]:
    """A function: what a checkpoint of Whisper's holds instead -> a models folder with it."""
    checkpoint = torch.load(MINI / FILES["whisper"], weights_only=True)

    def make(dims: object = None, **changes: object) -> Path:
        folder = models("whisper", b"")
        values = checkpoint | {"dims": checkpoint["dims"] | dims if isinstance(dims, dict) else dims} | changes
        torch.save(values if dims is not None else checkpoint | changes, folder / FILES["whisper"])
        return folder

    return make


@pytest.mark.parametrize(
    "value", [*ODD[1:], 2.0, "80", [80], {}, torch.tensor(80), torch.zeros(9)], ids=lambda v: repr(v)[:20]
)
@pytest.mark.parametrize("name", ["n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer"])
def test_a_dimension_of_whisper_that_its_tensors_have_not_is_refused(whisper, name, value):
    folder = whisper({name: value})
    assert len(refusal(lambda: load_audio_encoder(folder, CPU), str(folder / FILES["whisper"]))) < 2000


@pytest.mark.parametrize(
    "dims", [3, [], "x", {3: 4}, {"n_more": 1}, {"n_mels": 10**9, "n_audio_layer": 10**9}, torch.zeros(3)], ids=repr
)
def test_dims_that_are_none_of_whispers_are_refused(whisper, dims):
    folder = whisper(dims)
    refusal(lambda: load_audio_encoder(folder, CPU), str(folder / FILES["whisper"]))


@pytest.mark.parametrize(
    "tensors", [None, 3, [], {}, torch.zeros(3), {3: 4}, {"encoder.x": 3}, {"encoder.conv1.bias": []}], ids=repr
)
def test_tensors_that_are_none_of_whispers_are_refused(whisper, tensors):
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
