"""Face detectors, one backend per file."""
