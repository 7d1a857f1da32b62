"""From a batch to the model's inputs: latents are sampled from what the shards hold of their distribution."""

from types import SimpleNamespace

import numpy as np
import torch

from pipeline.train.inputs import Preparer
from pipeline.train.loader.shards import Raw, moments
from schemas.shard import encode_npy


def prepared(moments, seed):
    base = SimpleNamespace(
        kind="sd15", device="cpu", encode_text=lambda captions: SimpleNamespace(embeds=None, pooled=None)
    )
    given = {"text_embeds": None, "latents": moments, "captions": ["a"], "uncond_text": torch.tensor([False])}
    batch = SimpleNamespace(**given, condition={}, to=lambda device: batch)
    return Preparer(base, torch.Generator().manual_seed(seed))(batch).latents


def test_precomputed_latents_are_sampled_anew():
    mean = torch.randn(2, 4, 32, 32)
    deviation = torch.rand(2, 4, 32, 32) + 0.5
    given = torch.cat([mean, 2 * deviation.log()], dim=1).half()
    first, again, other = (prepared(given, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    drawn = (first - mean) / deviation
    assert abs(drawn.mean()) < 0.05
    assert abs(drawn.std() - 1) < 0.05
    assert not torch.allclose(first, other, atol=0.1)


def test_shards_that_hold_the_mean_alone_give_it():
    values = np.random.default_rng(0).normal(size=(4, 6, 10)).astype(np.float16)
    raw = Raw(None, "a-000000000", {"latents.full.npy": encode_npy(values)})
    read = torch.from_numpy(moments(raw, "latents.full.npy", (6, 10)))
    assert torch.equal(prepared(read[None], 3)[0], torch.from_numpy(values).float())
