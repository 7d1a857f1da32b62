"""Where rows come from: SHARDS words, file systems, formats of metadata, and existing downloads."""
