"""The device that a script chooses, and errors for GPUs that cannot be used. Needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import datasets_process
import musetalk_trainer
import syncnet_trainer
from musetalk import devices
from musetalk.contract import RIGID
from musetalk.devices import DeviceError, choose_device, describe, mixed_precision
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.unet import build_unet
from musetalk.training.checkpoint import save_unet
from musetalk.training.distributed import start_processes
from tools import distil_decoder

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version"
)


@pytest.fixture
def nvidia(monkeypatch, tmp_path) -> None:
    """A machine with an NVIDIA device and driver 535.104.05."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
        "GCC version:  gcc version 12.3.0\n"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "NVIDIA_DEVICES", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")


@pytest.fixture
def unusable(nvidia, monkeypatch) -> None:
    """A CUDA build of torch whose driver is too old."""

    def init() -> None:
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.fixture
def usable(nvidia, monkeypatch) -> None:
    """Working CUDA with two GPUs."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=round(79.2 * 2**30))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize("name", ["auto", "cuda:1"])
def test_a_driver_that_is_too_old_is_refused_with_both_versions(unusable, name):
    version = torch.__version__.partition("+")[0]
    with pytest.raises(DeviceError) as error:
        choose_device(name)
    for part in (
        f"torch {version} (CUDA 13.0)",
        "driver 535.104.05",
        "too old (found version 12020)",
        'device = "cpu"',
    ):
        assert part in str(error.value)
    assert choose_device("cpu").type == "cpu"


def test_a_cpu_build_of_torch_beside_a_gpu_is_refused(unusable, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"\(a CPU build\) with driver 535.104.05"):
        choose_device("auto")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_cuda_build_without_a_visible_gpu_uses_the_cpu(unusable, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(DeviceError):
        choose_device("cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices, "NVIDIA_DEVICES", ())
    assert choose_device("auto").type == "cpu"


def test_a_working_gpu_is_chosen_and_described(usable):
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1) and choose_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match="at most cuda:1, not 'cuda:2'"):
        choose_device("cuda:2")
    version = torch.__version__.partition("+")[0]
    expected = f"NVIDIA H100 80GB HBM3, 79.2 GiB, driver 535.104.05, torch {version} (CUDA 13.0)"
    assert describe(torch.device("cuda")) == expected


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:256", "cpu\n"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(DeviceError, match="^device must be "):
        choose_device(name)


@pytest.mark.parametrize(
    "main",
    [
        lambda: datasets_process.main(datasets_process.PrepareConfig(num_workers=1)),
        lambda: musetalk_trainer.train("demo", musetalk_trainer.PRESETS["demo"]),
        lambda: syncnet_trainer.train("demo", syncnet_trainer.PRESETS["demo"]),
        lambda: distil_decoder.main(distil_decoder.DistilConfig()),
    ],
    ids=["datasets_process", "musetalk_trainer", "syncnet_trainer", "distil_decoder"],
)
def test_every_script_refuses_an_unusable_gpu_before_it_writes(unusable, tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    with pytest.raises(DeviceError, match="too old"):
        main()
    assert list(tmp_path.iterdir()) == before


def test_the_pipeline_refuses_an_unusable_gpu_unless_given_the_cpu(unusable, mini, tmp_path):
    path = save_unet(tmp_path, 1, build_unet(mini, 0, True).model.state_dict(), RIGID)
    with pytest.raises(DeviceError, match="too old"):
        LipSyncPipeline.from_checkpoint(path, mini)
    pipeline = LipSyncPipeline.from_checkpoint(path, mini, device="cpu")
    assert pipeline.unet.model.device.type == "cpu"


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_uses_bf16_and_the_requested_kernels_on_gpus(usable, monkeypatch, deterministic):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(
        "musetalk.training.distributed.Accelerator", lambda **kwargs: SimpleNamespace(distributed_type="NO", **kwargs)
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul_precision = torch.get_float32_matmul_precision()
    try:
        on_gpu = start_processes("auto", deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
        assert torch.backends.cuda.mem_efficient_sdp_enabled() != deterministic
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
        torch.use_deterministic_algorithms(False)
        for enable in (torch.backends.cuda.enable_mem_efficient_sdp, torch.backends.cuda.enable_cudnn_sdp):
            enable(True)
    assert start_processes("cpu").cpu and not on_gpu.cpu and on_gpu.mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("device", "supported", "used"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_dubbing_uses_bf16_on_gpus_that_support_it_only(monkeypatch, device, supported, used):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with mixed_precision(torch.device(device)):
        assert torch.is_autocast_enabled("cuda") == used and not torch.is_autocast_enabled("cpu")
        assert not used or torch.get_autocast_dtype("cuda") == torch.bfloat16
