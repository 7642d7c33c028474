"""Which part of the recipe helps, by how much, on what it has not seen: see README.md in this folder."""
