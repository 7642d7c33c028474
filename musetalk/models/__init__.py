"""The networks: each built from its published configuration and loaded by its published names."""
