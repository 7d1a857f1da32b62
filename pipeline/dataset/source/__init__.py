"""Where rows come from: SHARDS words, file systems, formats of metadata, and existing downloads.

What is not there, cannot be read, or holds other things than it should, is a SourceError that names it.
"""
