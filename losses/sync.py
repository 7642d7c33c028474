"""How well mouths fit the audio, by the embeddings of a sync expert. Source: Wav2Lip, https://arxiv.org/abs/2008.10010."""

from __future__ import annotations

import torch

from losses import full_precision

CLAMP = 1e-4  # a probability's least distance from 0 and 1, so that its log is at least -9.2 and the slope at most 1e4


def sync_loss(face_embedding: torch.Tensor, audio_embedding: torch.Tensor) -> torch.Tensor:
    """-log of the cosines, as a mean: `sync_bce` of pairs that should all belong together. Both unit vectors (B, D)."""
    return sync_bce(face_embedding, audio_embedding, face_embedding.new_ones(len(face_embedding)))


def sync_bce(face_embedding: torch.Tensor, audio_embedding: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean binary cross entropy, in float32 at least, of cosines taken as probabilities of belonging together.

    face_embedding, audio_embedding: unit vectors (B, D). label: (B,), 1 where the two belong together and 0 where not.
    Probabilities are clamped to [1e-4, 1 - 1e-4], as rounding takes a cosine of equal vectors above 1. The gradient
    passes the clamp as if it were not there, with the slope at its edge: a mouth that does not fit at all still learns.
    """
    cosine = (full_precision(face_embedding) * full_precision(audio_embedding)).sum(dim=1)
    clamped = cosine.clamp(CLAMP, 1 - CLAMP)
    probability = clamped.detach() + (cosine - cosine.detach())  # the value of one, the gradient of the other
    return -torch.where(label.bool(), probability, 1 - probability).log().mean()
