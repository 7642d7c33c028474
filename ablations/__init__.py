"""Ablations: recipes of training compared on the same held-out clips; docs/ablations.md describes them."""
