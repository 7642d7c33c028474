"""The state of a training: networks, optimizers, the average of the weights, the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any, Generic

import numpy as np
import torch
from accelerate import Accelerator

from musetalk.contract import ALL_FIELDS, CACHE_FIELDS, CONTRACTS, MODEL_FIELDS, OWN_CONSTANTS, FeatureContract
from musetalk.data.audio import silence_features
from musetalk.data.cache import Cache
from musetalk.errors import TrainError
from musetalk.evaluation.sync_check import MAX_OFFSET
from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.models.lora import factors, trained_tensors
from musetalk.models.trained_unet import find_unet, read_unet_contract
from musetalk.models.unet import UNet
from musetalk.models.vae import VAE, load_vae
from musetalk.models.weights import Network, WeightsError, load_strictly, read_tensors, unwrap
from musetalk.training.checkpoint import GO_BACK
from musetalk.training.fine_tuning import Best
from musetalk.training.protocols import State

MAX_STEPS = 2**53
# In variants that make no temporary copy as large as the weights.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamax": partial(torch.optim.Adamax, foreach=False),
    "adam": partial(torch.optim.Adam, fused=True),
}


@dataclass
class NetworkState(Generic[Network]):
    """The state of a training of a single network."""

    network: Network
    optimizer: torch.optim.Optimizer
    resume_metadata: Mapping[str, object]  # values that a resumed run must share
    step: int = 0  # optimizer updates made

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def as_dict(self) -> dict:
        """Returns what a training state file holds, except the step."""
        tensors = {"network": self.network.state_dict(), "optimizer": optimizer_state(self.optimizer)}
        return {**tensors, **self.resume_metadata}

    def restore(self, saved: dict, path: Path) -> None:
        """Restores what `as_dict` returned, read from `path`. Raises WeightsError if it is of another training."""
        check_keys(self, saved, path)
        for name, value in self.resume_metadata.items():
            if saved[name] != value:
                raise WeightsError(
                    f"{path} was saved with {name} = {short(saved[name])}, not {value!r}; set it back, or choose "
                    "another checkpoint_dir"
                )
        check_number(saved, "step", 0, MAX_STEPS, path)
        load_strictly(self.network, saved["network"], path)
        restore_optimizer_state(self.optimizer, saved["optimizer"], path)
        self.step = saved["step"]


@dataclass
class TrainState:
    """The state of a UNet training."""

    unet: UNet
    contract: FeatureContract  # of the data and the audio window
    optimizer: torch.optim.Optimizer
    optimizer_name: str  # a key of `OPTIMIZERS`, shared with the discriminators
    ema: dict[str, torch.Tensor]  # averages of the trained parameters by name, on the device or in host memory
    gan_losses: dict[str, Any] = field(default_factory=dict)  # by region, each with `network` and `optimizer`
    adaptive_weights: dict[str, torch.Tensor] = field(default_factory=dict)  # factor of adv_g by region
    sync_offset: int = 0  # frames by which the sync expert's mel is shifted, as its check measured
    best: Best = field(default_factory=Best)  # validation
    step: int = 0  # optimizer updates made

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer, *(x.optimizer for x in self.gan_losses.values())]

    def as_dict(self) -> dict:
        """Returns what a training state file holds, except the step."""
        return {
            "unet": self.unet.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "optimizer_name": self.optimizer_name,
            "ema": self.ema,
            "gan_losses": {
                region: {"network": x.network.state_dict(), "optimizer": optimizer_state(x.optimizer)}
                for region, x in self.gan_losses.items()
            },
            "adaptive_weights": self.adaptive_weights,
            "sync_offset": self.sync_offset,
            "best": asdict(self.best),
            "contract": self.contract.as_dict(ALL_FIELDS),
        }

    def restore(self, saved: dict, path: Path) -> None:
        """Restores what `as_dict` returned, read from `path`.

        Raises WeightsError if it is of another training, ContractError if its contract differs.
        """
        saved = {"best": asdict(Best())} | saved  # older states have none
        check_keys(self, saved, path)
        FeatureContract.from_dict(saved["contract"], ALL_FIELDS, str(path)).require(
            self.contract, ALL_FIELDS, str(path.parent)
        )
        if saved["optimizer_name"] != self.optimizer_name:
            raise WeightsError(
                f"{path} was saved with optimizer = {short(saved['optimizer_name'])}, not {self.optimizer_name!r}; set "
                "it back, or choose another checkpoint_dir"
            )
        check_number(saved, "step", 0, MAX_STEPS, path)
        check_number(saved, "sync_offset", -MAX_OFFSET, MAX_OFFSET, path)
        best = restored_best(saved["best"], path)
        self._check_trained(saved["ema"], path)
        self._check_discriminators(saved, path)
        load_strictly(self.unet.model, saved["unet"], path)
        self.restart_ema()
        load_strictly(self.unet.model, saved["unet"] | saved["ema"], path)
        self._swap()
        restore_optimizer_state(self.optimizer, saved["optimizer"], path)
        for region, gan_loss in self.gan_losses.items():
            load_strictly(gan_loss.network, saved["gan_losses"][region]["network"], path)
            restore_optimizer_state(gan_loss.optimizer, saved["gan_losses"][region]["optimizer"], path)
        for region, weight in self.adaptive_weights.items():
            weight.copy_(saved["adaptive_weights"][region])
        self.step, self.sync_offset, self.best = saved["step"], saved["sync_offset"], best

    def _check_trained(self, ema: object, path: Path) -> None:
        """Raises WeightsError if the saved averages are not those of the parameters that this training trains."""
        if not isinstance(ema, dict) or ema.keys() != self.ema.keys():
            raise WeightsError(
                f"{path} was saved with another value of `trained`; set it back, or train another preset from its "
                "weights with start_from"
            )

    def _check_discriminators(self, saved: dict, path: Path) -> None:
        """Raises WeightsError if the saved discriminators are not those of this training."""
        gan_losses, adaptive_weights = saved["gan_losses"], saved["adaptive_weights"]
        if not isinstance(gan_losses, dict) or gan_losses.keys() != self.gan_losses.keys():
            raise WeightsError(
                f"{path} was saved with other discriminators; set loss_weights back, or train another preset from its "
                "weights with start_from"
            )
        if not isinstance(adaptive_weights, dict) or adaptive_weights.keys() != self.adaptive_weights.keys():
            raise WeightsError(f"{path} was saved with or without adaptive_every, unlike this run; set it back")

    def load_pretrained(self, path: Path) -> str:
        """Loads UNet weights to start from, of this project or another. Returns a sentence for the log.

        path: a file, or a folder whose newest weights are loaded. Raises WeightsError; ContractError if they were
        trained under another contract, except for the precision of the latents, which depends on the machine.
        """
        file = find_unet(path)
        contract = read_unet_contract(file)
        if contract:
            fields = tuple(field for field in ALL_FIELDS if field != "encode_dtype")
            contract.require(self.contract, fields, str(file))
        model = self.unet.model
        load_strictly(model, unwrap(read_tensors(file), file) | factors(model.state_dict()), file)
        self.restart_ema()
        return f"starts from {file}" + ("" if contract else ", which carries no contract; this run's is assumed")

    def restart_ema(self) -> None:
        """Sets the average to the weights."""
        for name, value in trained_tensors(self.unet.model).items():
            self.ema[name].copy_(value)

    def update_ema(self, decay: float) -> None:
        """Moves the average towards the weights; the decay warms up, so that the initial weights are soon forgotten."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for name, value in trained_tensors(self.unet.model).items():
            self.ema[name].lerp_(value.to(self.ema[name].device), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swaps the averaged weights and those of the UNet inside the context."""
        self._swap()
        yield
        self._swap()

    def _swap(self) -> None:
        """Exchanges the average and the weights, one tensor after the other."""
        for name, value in trained_tensors(self.unet.model).items():
            weight = value.clone()
            value.copy_(self.ema[name])
            self.ema[name].copy_(weight)


def check_keys(state: State, saved: dict, path: Path) -> None:
    """Raises WeightsError if a saved state lacks an entry of this one."""
    if missing := (state.as_dict().keys() | {"step"}) - saved.keys():
        raise WeightsError(f"{path} is not a state of this training, it lacks {', '.join(sorted(missing))}; {GO_BACK}")


def check_number(saved: dict, name: str, least: int, most: int, path: Path) -> None:
    """Raises WeightsError if a saved value is not an integer in [least, most]."""
    if type(saved[name]) is not int or not least <= saved[name] <= most:
        raise WeightsError(f"{path} has an invalid {name}: {short(saved[name])}; {GO_BACK}")


def restored_best(values: object, path: Path) -> Best:
    """Returns the best validation as it was saved. Raises WeightsError if it is invalid."""
    kinds = {name: type(value) for name, value in asdict(Best()).items()}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != kinds:
        raise WeightsError(f"{path} has an invalid best: {short(values)}; {GO_BACK}")
    return Best(**values)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict:
    """Returns an optimizer's moments; its constants are those of the run that resumes."""
    return {"state": optimizer.state_dict()["state"]}


def restore_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict, path: Path) -> None:
    """Restores what `optimizer_state` returned, keeping this run's constants. Raises WeightsError."""
    groups = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} holds no state of this optimizer; {GO_BACK}") from error
    for values in optimizer.state.values():  # tensors that torch has not copied would keep the file open
        values.update({name: value.clone() for name, value in values.items() if value.device.type == "cpu"})


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """Precision of the frozen networks."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def load_pixel_vae(models_dir: Path, accelerator: Accelerator) -> VAE:
    """Loads the frozen VAE in the precision and layout that are fastest for image losses. Raises WeightsError."""
    layout = torch.contiguous_format if accelerator.device.type == "cpu" else torch.channels_last
    return load_vae(models_dir, accelerator.device, frozen_dtype(accelerator), layout)


def check_weight_decay(optimizer: str, weight_decay: float) -> None:
    """Raises TrainError for weight decay with an optimizer that adds it to the gradient, whose scale it then loses."""
    if weight_decay and optimizer != "adamw":
        raise TrainError(
            f"weight_decay must be 0 with {optimizer}, which normalises it with the gradient; use adamw, which "
            "decouples the two"
        )


def load_silence(models_dir: Path, cache: Cache, device: torch.device) -> np.ndarray:
    """Returns `silence_features` of the cache's audio encoder. Raises WeightsError, ContractError for another one."""
    encoder = load_audio_encoder(models_dir, device)
    requested = replace(cache.contract, audio_encoder=encoder.fingerprint)
    cache.contract.require(requested, ("audio_encoder",), str(cache.folder))
    return silence_features(encoder, cache.contract)


def training_contract(name: str, cache: Cache, positional_encoding: bool) -> FeatureContract:
    """The cache's contract, with the model fields of CONTRACTS[name] and this positional encoding.

    Raises ContractError for a cache prepared under another contract; only the constants of preparation that users set
    and the posterior may differ.
    """
    chosen = replace(CONTRACTS[name], positional_encoding=positional_encoding)
    shared = tuple(field for field in CACHE_FIELDS if field not in (*OWN_CONSTANTS, "posterior"))
    cache.contract.require(chosen, shared, str(cache.folder))
    return replace(cache.contract, **{field: getattr(chosen, field) for field in MODEL_FIELDS})
