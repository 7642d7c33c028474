"""Checks training, resuming and dubbing on a GPU (`python -m tools.gpu_check`)."""
