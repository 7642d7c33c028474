"""The check reports whether training could start, and which file prevents it."""

from __future__ import annotations

import re
import shutil

import pytest

from musetalk.check import CheckConfig, main
from musetalk.errors import UserError


@pytest.fixture
def models(mini, tmp_path):
    """A copy of the small networks."""
    return shutil.copytree(mini, tmp_path / "models")


def test_the_small_networks_pass_and_results_are_reproducible(sample_cache, models, capsys):
    main(CheckConfig(models_dir=models, hdtf_samples_dir=sample_cache.folder))
    report = capsys.readouterr().out
    assert not re.search("^!", report, re.MULTILINE)
    for part in ("VAE: loads", "audio encoder: loads", "UNet, untrained: loads", "3 clips", sample_cache.contract.vae):
        assert part in report
    main(CheckConfig(models_dir=models, hdtf_samples_dir=sample_cache.folder))
    values = re.compile(r"output \S+")
    assert values.findall(capsys.readouterr().out) == values.findall(report)


def test_a_corrupted_file_is_named_and_the_others_are_checked(sample_cache, models, capsys):
    broken = models / "sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not start"):
        main(CheckConfig(models_dir=models, hdtf_samples_dir=sample_cache.folder))
    out = capsys.readouterr().out
    (fault,) = re.findall("^!.*", out, re.MULTILINE)
    assert str(broken) in fault
    assert "audio encoder: loads" in out and "3 clips" in out


def test_a_missing_cache_is_a_fault(sample_cache, models, tmp_path, capsys):
    with pytest.raises(UserError):
        main(CheckConfig(models_dir=models, hdtf_samples_dir=tmp_path))
    assert f"! cache: {tmp_path}" in capsys.readouterr().out
