"""Fault injection on the real scripts (`python -m tools.torture`)."""
