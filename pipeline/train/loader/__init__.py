"""Finished shards to typed batches; nothing is known here of how the shards were made."""
