"""Finished shards to typed batches; nothing is known here of how the shards were made."""

from pipeline.train.loader.batches import Batch, Position
from pipeline.train.loader.condition import conditions, require, unconditional, widths
from pipeline.train.loader.dataset import Dataset, check_hashes, open_dataset
from pipeline.train.loader.faces import Face, Photo, Pixels, first_faces
from pipeline.train.loader.loader import ShardLoader, worker_died
from pipeline.train.loader.reading import Reading, plan_reading

__all__ = [
    "Batch",
    "Dataset",
    "Face",
    "Photo",
    "Pixels",
    "Position",
    "Reading",
    "ShardLoader",
    "check_hashes",
    "conditions",
    "first_faces",
    "open_dataset",
    "plan_reading",
    "require",
    "unconditional",
    "widths",
    "worker_died",
]
