"""Ablations of the training recipe, measured on held-out clips; see README.md in this folder."""
