"""Finished shards to typed batches; nothing is known here of how the shards were made."""

from pipeline.train.loader.batches import Batch
from pipeline.train.loader.dataset import Dataset, check_hashes, models_of, open_dataset
from pipeline.train.loader.faces import Face, Photo, first_faces
from pipeline.train.loader.loader import ShardLoader, worker_died
from pipeline.train.loader.reading import Features, features_of, plan_reading

__all__ = [
    "Batch",
    "Dataset",
    "Face",
    "Features",
    "Photo",
    "ShardLoader",
    "check_hashes",
    "features_of",
    "first_faces",
    "models_of",
    "open_dataset",
    "plan_reading",
    "worker_died",
]
