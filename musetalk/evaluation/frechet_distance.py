"""The Frechet distance of two sets of features, called FID if they are those of Inception.

Heusel et al. 2017, https://arxiv.org/abs/1706.08500; Dowson and Landau 1982, https://doi.org/10.1016/0047-259X(82)90077-X
"""

from __future__ import annotations

import numpy as np

from musetalk.errors import UserError

MIN_FRAMES = 2000  # fewer give a distance that is mostly noise


def frechet_distance(features: np.ndarray, true_features: np.ndarray) -> float:
    """Squared Frechet distance of two normal distributions with the means and covariances of the features.

    features, true_features: float64 (N, D) and (M, D), one row a frame. Returns |m1 - m2|^2 + tr(C1 + C2 -
    2 sqrt(C1 C2)), which is 0 for equal features, up to rounding. Raises UserError if N or M is below `MIN_FRAMES`.
    """
    frames = min(len(features), len(true_features))
    if frames < MIN_FRAMES:
        raise UserError(f"FID of fewer than {MIN_FRAMES} frames is noise, but there are {frames}; use more clips")
    root, true_root = _covariance_root(features), _covariance_root(true_features)
    # The eigenvalues of C1 C2 are the squared singular values of the product of the roots. Computed from the roots, the
    # small ones keep their digits, and none is negative or complex.
    trace = np.linalg.svd(root @ true_root.T, compute_uv=False).sum()
    difference = features.mean(axis=0) - true_features.mean(axis=0)
    return float((difference**2).sum() + (root**2).sum() + (true_root**2).sum() - 2 * trace)


def _covariance_root(features: np.ndarray) -> np.ndarray:
    """A triangular R with R^T R = C, the unbiased covariance of features (N, D): (min(N, D), D)."""
    return np.linalg.qr(features - features.mean(axis=0), mode="r") / np.sqrt(len(features) - 1)
