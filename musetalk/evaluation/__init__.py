"""Evaluation: the published measures of generated videos, by published networks."""
