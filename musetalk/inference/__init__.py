"""Weights, video and audio -> lip-synced video."""
