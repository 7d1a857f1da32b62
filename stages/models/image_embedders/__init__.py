"""Image feature extractors, one backend per file."""
