"""Inference: trained weights, a video and an audio -> a lip-synced video."""
