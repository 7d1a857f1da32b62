"""What a row, a shard and a drop are: names, types and words shared by every part of faceshards."""
