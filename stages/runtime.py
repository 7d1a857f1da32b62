"""What is known only when a run begins. It travels beside the settings, which are what the user set."""

from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class EncoderSource:
    """The encoders of the base that `encode.base` names."""

    name: str
    """The base's name, for people."""
    folder: str
    """Its diffusers folder."""
    kind: Literal["sd15", "sdxl"]
    """Which pipeline the base belongs to."""
    vae_sha256: str
    """Of the VAE's weights."""
    text_sha256: str
    """Of the text encoder's weights; both, joined by `+`, where there are two."""


@dataclass(frozen=True)
class Runtime:
    """The facts of a run that no config names; picklable, the same in every process of the run."""

    device: Device = "cpu"
    """Where the models compute: cuda when executor.gpus > 0."""
    encoders: EncoderSource | None = None
    """Present where `encode` computes latents or text embeddings."""
    heads: tuple[tuple[str, str], ...] = ()
    """Key of `models.heads` and sha256 of the file, of those in use."""
    refusals: str = ""
    """File in which the processes of this machine share what was refused, so that none asks again; may be none."""
    sample_port: int | None = None
    """Port of the bundled sample's loopback server, while it runs."""
