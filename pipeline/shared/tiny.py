"""Tiny pipelines with random weights in the layout of Stable Diffusion 1.5 and SDXL, from configs in code.

They draw nothing, and load wherever the real ones do: for tests, and for trying the trainer on any machine.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from schemas.targets import BaseKind

_SEED = 15
_WIDTH = 128
"""Text width: two heads of 64, as the published projections need whole heads."""
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
"""The noise schedule of both real bases."""
_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "cross_attention_dim": _WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_UNETS: dict[BaseKind, dict[str, Any]] = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + _WIDTH // 2,
    },
}
_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 4,
}


def write_tiny(folder: Path, kind: BaseKind) -> None:
    """Write a pipeline in diffusers' layout; the same weights every time."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        parts: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel(**_UNET, **_UNETS[kind]),
            "vae": diffusers.AutoencoderKL(**_VAE, scaling_factor=0.18215 if kind == "sd15" else 0.13025),
            "tokenizer": tokenizer(),
        }
        pipeline: Any
        if kind == "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline(
                **parts,
                tokenizer_2=tokenizer(),
                text_encoder=_text_encoder(_WIDTH // 2, projected=False),
                text_encoder_2=_text_encoder(_WIDTH // 2, projected=True),
                scheduler=diffusers.EulerDiscreteScheduler(**NOISE),
                add_watermarker=False,
            )
        else:
            pipeline = diffusers.StableDiffusionPipeline(
                **parts,
                text_encoder=_text_encoder(_WIDTH, projected=False),
                scheduler=diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.save_pretrained(folder, safe_serialization=True)


def _text_encoder(width: int, *, projected: bool) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    made = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return made(config).eval()


def tokenizer() -> Any:
    """CLIP's tokenizer over single bytes."""
    import transformers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # Every byte inside a word, every byte at its end, and CLIP's two marks.
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as name:
        vocabulary, merges = Path(name) / "vocab.json", Path(name) / "merges.txt"
        vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
