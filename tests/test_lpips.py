"""LPIPS against hand-worked values and published shapes, and its files."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from hostile import refusal

from musetalk.models.lpips import LPIPS, VGG16, Heads, load_lpips

CPU = torch.device("cpu")
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the published code
EPS = 1e-8  # added to the squared norm


@pytest.fixture
def hand_lpips() -> LPIPS:
    """LPIPS whose convolutions pass red and green on; the head of stage k weights them k + 1 and 2."""
    trunk, heads = VGG16((2,) * 5).double(), Heads((2,) * 5).double()
    for tensor in trunk.state_dict().values():
        tensor.zero_()
        if tensor.ndim == 4:
            tensor[0, 0, 1, 1] = tensor[1, 1, 1, 1] = 1
    for index, head in enumerate(heads.state_dict().values()):
        head[0, :, 0, 0] = torch.tensor([index + 1, 2])
    return LPIPS(trunk, heads)


def painted(red: float, green: float) -> torch.Tensor:
    """A uniform image with these values after normalisation."""
    values = [value * scale + shift for value, scale, shift in zip((red, green, 0), SCALE, SHIFT, strict=True)]
    return torch.tensor(values, dtype=torch.float64)[None, :, None, None].expand(1, 3, 16, 16).clone()


def test_lpips_by_hand(hand_lpips):
    """(3, 4) and (4, 3), both of length 5, differ by 0.2 per channel once normalised; ReLU removes negative values."""
    result = hand_lpips(painted(3, 4), painted(4, 3))
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx((1 + 2 + 3 + 4 + 5 + 5 * 2) * 0.04, rel=1e-8)
    # One image is only red, the other only green: squared differences of 1 each.
    assert hand_lpips(painted(1, -1), painted(-1, 1)).item() == pytest.approx(25, rel=1e-7)
    # Compared with black, the norm of the other image remains, here a small one.
    share = 1e-4**2 / (1e-4**2 + EPS)
    assert hand_lpips(painted(1e-4, -1), painted(-1, -1)).item() == pytest.approx(15 * share, rel=1e-6)
    both = hand_lpips(torch.cat([painted(3, 4), painted(1, 1)]), torch.cat([painted(4, 3), painted(1, 1)]))
    assert both.tolist() == pytest.approx([1.0, 0.0])


def test_gradients_of_lpips_are_finite_and_reach_no_weights(hand_lpips):
    first = painted(3, 4)
    first[..., :8] = painted(-1, -1)[..., :8]
    first.requires_grad_()
    hand_lpips.train()(first, painted(4, 3)).sum().backward()
    assert torch.isfinite(first.grad).all() and first.grad[:, :2, :, 8:].all() and not first.grad[:, 2].any()
    assert all(weight.grad is None for weight in hand_lpips.parameters())


# Files.


@pytest.mark.parametrize(
    "build, entries, parameters, shapes",
    [
        (
            VGG16,
            26,
            14_714_688,
            {"features.0.weight": (64, 3, 3, 3), "features.10.bias": (256,), "features.28.weight": (512, 512, 3, 3)},
        ),
        (Heads, 5, 1472, {"lin0.model.1.weight": (1, 64, 1, 1), "lin4.model.1.weight": (1, 512, 1, 1)}),
    ],
)
def test_a_network_has_the_published_size_names_and_shapes(build, entries, parameters, shapes):
    with torch.device("meta"):
        network = build()
    own = network.state_dict()
    assert len(own) == entries and sum(weight.numel() for weight in network.parameters()) == parameters
    assert shapes.items() <= {name: tuple(tensor.shape) for name, tensor in own.items()}.items()


class OldTensor:
    """A tensor that is pickled as in torch 0.1 of 2017, which wrote the published VGG16."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.parts = tensor.untyped_storage(), 0, tuple(tensor.shape), tensor.stride()

    def __reduce__(self):
        return torch._utils._rebuild_tensor, self.parts


class OldPickler(pickle.Pickler):
    """Replaces storages by numbers and collects them."""

    def __init__(self, file) -> None:
        super().__init__(file, protocol=2)
        self.storages = []

    def persistent_id(self, value):
        if not isinstance(value, torch.UntypedStorage):
            return None
        self.storages.append(value)
        return "storage", torch.FloatStorage, str(len(self.storages)), "cpu", len(value) // 4, None


def save_with_torch_01(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        sizes = {"short": 2, "int": 4, "long": 4}
        system = {"protocol_version": 1001, "little_endian": sys.byteorder == "little", "type_sizes": sizes}
        for value in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(value, file, protocol=2)
        pickler = OldPickler(file)
        pickler.dump({name: OldTensor(tensor) for name, tensor in tensors.items()})
        pickle.dump([str(number + 1) for number in range(len(pickler.storages))], file, protocol=2)
        for storage in pickler.storages:
            file.write(
                struct.pack("<q", len(storage) // 4) + bytes(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())
            )


def test_published_files_are_loaded_exactly_and_the_classifier_of_vgg_is_skipped(tmp_path):
    torch.manual_seed(0)
    trunk, heads = VGG16(), Heads()
    classifier = {f"classifier.{k}.{kind}": torch.ones(2) for k in (0, 3, 6) for kind in ("weight", "bias")}
    save_with_torch_01(trunk.state_dict() | classifier, tmp_path / "vgg/vgg16-397923af.pth")
    assert "is missing" in refusal(lambda: load_lpips(tmp_path, CPU), "vgg/lpips.pth")
    torch.save(heads.state_dict(), tmp_path / "vgg/lpips.pth")
    loaded = load_lpips(tmp_path, CPU)
    for network, original in ((loaded.trunk, trunk), (loaded.heads, heads)):
        tensors = network.state_dict()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in original.state_dict().items())
    rounded = load_lpips(tmp_path, CPU, torch.bfloat16)
    first, second = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert rounded(first, second).dtype == torch.float32
    torch.testing.assert_close(rounded(first, second), loaded(first, second), rtol=0.1, atol=1e-3)
