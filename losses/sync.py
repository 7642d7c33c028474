"""Sync losses on the embeddings of a sync expert. Source: Wav2Lip, https://arxiv.org/abs/2008.10010."""

from __future__ import annotations

import torch

from losses import full_precision

CLAMP = 1e-4  # least distance of a probability from 0 and 1: its log is at least -9.2, the slope at most 1e4


def sync_loss(face_embedding: torch.Tensor, audio_embedding: torch.Tensor) -> torch.Tensor:
    """Mean -log cosine: `sync_bce` with all pairs labelled in sync. Both inputs are unit vectors (B, D)."""
    return sync_bce(face_embedding, audio_embedding, face_embedding.new_ones(len(face_embedding)))


def sync_bce(face_embedding: torch.Tensor, audio_embedding: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean binary cross entropy in float32 or float64, with cosines as the probabilities of being in sync.

    face_embedding, audio_embedding: unit vectors (B, D). label: (B,), 1 for pairs in sync, 0 for others.
    Probabilities are clamped to [1e-4, 1 - 1e-4], since rounding can put the cosine of equal vectors above 1. The clamp
    is a straight-through one: its gradient is that at the bound, so that a pair without any match still learns.
    """
    cosine = (full_precision(face_embedding) * full_precision(audio_embedding)).sum(dim=1)
    clamped = cosine.clamp(CLAMP, 1 - CLAMP)
    probability = clamped.detach() + (cosine - cosine.detach())  # value of clamped, gradient of cosine
    return -torch.where(label.bool(), probability, 1 - probability).log().mean()
