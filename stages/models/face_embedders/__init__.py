"""Identity embedders, one backend per file."""
