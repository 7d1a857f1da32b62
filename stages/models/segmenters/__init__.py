"""Face parsers, one backend per file."""
