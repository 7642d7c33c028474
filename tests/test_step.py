"""One optimizer step, by hand-worked values. test_distributed.py has the average over processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from musetalk.errors import TrainError
from musetalk.training.step import OptimizerStep, scheduled_rate
from tests.ranks import Config

CONFIG = Config(Path("states"), Path("log"), learning_rate=1.0, final_learning_rate=1.0, max_grad_norm=1.0)


def parameter(*gradient: float) -> torch.nn.Parameter:
    """Zeros with a gradient."""
    zeros = torch.nn.Parameter(torch.zeros(len(gradient)))
    zeros.grad = torch.tensor(gradient)
    return zeros


def sgd(*parameters: torch.nn.Parameter, learning_rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, learning_rate)


def test_micro_steps_equal_one_large_batch():
    """The loss x^2 w of the samples 1, 2, 3, 4 has the mean gradient 7.5, in one batch as in two."""
    moved = []
    for samples in ([[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]):
        weight = parameter(0.0)
        config = replace(CONFIG, grad_accum_steps=len(samples), max_grad_norm=100.0)
        step = OptimizerStep(0, config, [sgd(weight)])
        batches = iter([{"x": torch.tensor(x), "where": [str(x)]} for x in [*samples, [9.0]]])
        for batch in step.micro_batches(batches):
            loss = (batch["x"] ** 2 * weight).mean()
            (loss / config.grad_accum_steps).backward()
            step.add({"mean": batch["x"].mean()})
        result = step.update()
        assert result.terms == {"mean": 2.5} and result.grad_norm == 7.5
        assert next(batches)["where"] == ["[9.0]"]  # a batch of the next step
        moved.append(weight.item())
    assert moved == [-7.5, -7.5]


def test_random_numbers_depend_on_seed_and_step_alone():
    def draw(step: int, seed: int = 0) -> float:
        torch.rand(3)
        (batch,) = OptimizerStep(step, replace(CONFIG, seed=seed), []).micro_batches(iter([{"where": []}]))
        return torch.rand(()).item()

    assert draw(7) == draw(7) and len({draw(7), draw(8), draw(7, seed=5)}) == 3


def test_gradients_of_each_optimizer_are_clipped_to_the_maximal_norm():
    """(3, 4) over two parameters has the norm 5; (0.3, 0.4) is below the maximum."""
    large, small = [parameter(3.0), parameter(4.0)], parameter(0.3, 0.4)
    result = OptimizerStep(0, CONFIG, [sgd(*large), sgd(small)]).update()
    torch.testing.assert_close(torch.cat(large), torch.tensor([-0.6, -0.8]))
    torch.testing.assert_close(small.data, torch.tensor([-0.3, -0.4]))
    assert result.grad_norm == 5 and result.skipped == ""
    assert large[0].grad is None and small.grad is None


def test_the_schedule_sets_the_rate_of_the_first_optimizer_alone():
    first, second = parameter(1.0), parameter(1.0)
    config = replace(CONFIG, warmup_steps=4, max_grad_norm=100.0)
    optimizers = [sgd(first, learning_rate=9.0), sgd(second, learning_rate=0.125)]
    result = OptimizerStep(1, config, optimizers).update()
    assert (result.learning_rate, first.item(), second.item()) == (0.5, -0.5, -0.125)


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_parameter(broken, value):
    parameters = [parameter(1.0, 1.0), parameter(1.0)]
    parameters[broken].grad[0] = value
    optimizers = [torch.optim.Adam([x], 0.1) for x in parameters]
    step = OptimizerStep(2, replace(CONFIG, on_nonfinite="skip"), optimizers)
    list(step.micro_batches(iter([{"where": ["a, frame 3"]}])))
    step.add({"pixel_l1": torch.tensor(value), "latent_l1": torch.tensor(1.0)})
    skipped = step.update().skipped
    for name in ("step 3", "pixel_l1", "a, frame 3", "states"):
        assert name in skipped
    assert "latent_l1" not in skipped
    assert not any(x.any() for x in parameters) and not any(x.state for x in optimizers)
    assert all(x.grad is None for x in parameters)


def test_a_gradient_that_is_not_finite_stops_the_run_by_default():
    weight = parameter(float("nan"))
    with pytest.raises(TrainError, match="step 1: the gradient is not finite"):
        OptimizerStep(0, CONFIG, [sgd(weight)]).update()
    assert weight.item() == 0


def test_the_learning_rate_rises_linearly_then_falls_along_a_cosine():
    config = replace(CONFIG, final_learning_rate=0.2, warmup_steps=4, num_steps=104)
    rates = {step: scheduled_rate(step, config) for step in (0, 1, 3, 4, 29, 54, 104, 1000)}
    # A quarter of the way down the cosine is (1 + cos 45 degrees) / 2 = 0.8536 of the distance.
    assert rates == pytest.approx(
        {0: 0.25, 1: 0.5, 3: 1, 4: 1, 29: 0.2 + 0.8 * 0.8536, 54: 0.6, 104: 0.2, 1000: 0.2}, 1e-4
    )
    for warmup_steps, num_steps in ((0, 1), (5, 5), (10, 4)):  # without a warm-up, or with nothing after it
        config = replace(CONFIG, warmup_steps=warmup_steps, num_steps=num_steps)
        assert 0 < scheduled_rate(0, config) <= 1
