"""Benchmarks of training, the cache and inference against targets; see README.md in this folder."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the project
