"""The Frechet distance against its formula and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
from hostile import refusal

from musetalk.evaluation.frechet_distance import frechet_distance


def samples(mean: list[float], covariance: list[list[float]], count: int) -> np.ndarray:
    """Features (count, D) whose empirical mean and unbiased covariance are exactly these."""
    columns = np.random.default_rng(count).standard_normal((count, len(mean)))
    orthonormal = np.linalg.qr(np.column_stack([np.ones(count), columns]))[0][:, 1:]  # so each sums to 0
    return mean + np.sqrt(count - 1) * orthonormal @ np.linalg.cholesky(covariance).T


def test_the_distance_of_two_normal_distributions_by_hand():
    """C1 C2 = [[8, 1], [4, 2]] has trace 10 and determinant 12, so its root has trace sqrt(10 + 2 sqrt(12))."""
    first = samples([1, 2], [[2, 1], [1, 2]], 2000)
    second = samples([4, -2], [[4, 0], [0, 1]], 2500)
    expected = 3**2 + 4**2 + 4 + 5 - 2 * np.sqrt(10 + 2 * np.sqrt(12))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-12)


def test_small_and_vanishing_variances_count_exactly():
    """Of uncorrelated features it is the sum of squared differences of means and standard deviations."""
    deviations = np.array([[1e3, 1, 1e-4, 0], [2e3, 1, 3e-4, 0]])
    first, second = (samples([0] * 4, np.eye(4), 2000) * row for row in deviations)
    assert frechet_distance(first, first + np.array([0, 0, 0, 5])) == pytest.approx(25)
    assert frechet_distance(first, second) == pytest.approx(1e6 + 4e-8, rel=1e-12)
    assert frechet_distance(first[:, 2:], second[:, 2:]) == pytest.approx(4e-8, rel=1e-9)


def test_fewer_frames_than_features_still_have_a_distance():
    features = np.random.default_rng(0).standard_normal((2000, 2048))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(features, features + 0.5) == pytest.approx(2048 / 4)


def test_the_distance_is_that_of_torchmetrics():
    """The value is that of FrechetInceptionDistance of torchmetrics 1.9.0 in float64, with a feature network that
    passes these features on."""

    def features(count: int, speed: float) -> np.ndarray:
        return np.sin(speed * np.arange(count * 16) ** 2).reshape(count, 16)

    second = features(2100, 0.0007) * np.linspace(0.5, 2, 16) + np.linspace(0, 1, 16)
    assert frechet_distance(features(2000, 0.001), second) == pytest.approx(8.045303931871, rel=1e-9)


def test_fewer_than_2000_frames_are_refused():
    enough = np.random.default_rng(0).standard_normal((2000, 2))
    frechet_distance(enough, enough)
    for pair in ((enough[1:], enough), (enough, enough[1:])):
        assert "2000" in refusal(lambda pair=pair: frechet_distance(*pair), "1999")
