"""Raw videos -> cache -> samples."""
