"""The networks: built from their published configurations, loaded under their published names."""
