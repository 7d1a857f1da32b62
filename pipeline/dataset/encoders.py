"""The encoders that `--with latents,text` asks for: from the name of a base to its files and their papers."""

from pipeline.dataset.config import Config
from pipeline.shared.bases import find_base
from schemas.targets import text_sha256, vae_sha256
from stages.models.backends import ModelCard
from stages.settings import EncoderSource


def with_encoders(config: Config) -> tuple[Config, tuple[ModelCard, ...]]:
    """The config with `encode.source` filled in, and the cards of the encoders that it uses; nothing is loaded.

    Raises:
        WeightsError: when the base is not there; says what to fetch and where to put it.
    """
    told = config.encode
    if not told.encodes:
        return config, ()
    base = find_base(told.base)
    source = EncoderSource(
        name=base.name,
        folder=str(base.folder.resolve()),
        kind=base.kind,
        vae_sha256=vae_sha256(base.folder),
        text_sha256=text_sha256(base.folder),
    )
    hashes = [("vae", source.vae_sha256)] if told.latents else []
    if told.text:
        hashes += zip(("text_encoder", "text_encoder_2"), source.text_sha256.split("+"), strict=False)
    cards = tuple(ModelCard(f"{base.name}/{part}", "encoder", sha256, base.licence, True) for part, sha256 in hashes)
    return config.model_copy(update={"encode": told.model_copy(update={"source": source})}), cards
