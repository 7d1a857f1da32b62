"""A CLIP of a few kB with random weights, image and text, as transformers saves it; loaded by path."""

import json
import math
from pathlib import Path

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def write(folder: Path, width: int = 24) -> tuple[Path, Path]:
    """The folders of its image tower and of the whole, both with vectors of that width."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    images, whole = folder / "images", folder / "whole"
    words = {"hidden_act": "gelu", "vocab_size": 600, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config={**_SMALL, **words, "projection_dim": width},
            vision_config={**_SMALL, "patch_size": 14, "image_size": 224, "projection_dim": width},
            projection_dim=width,
            logit_scale_init_value=math.log(100),
        )
        model = transformers.CLIPModel(config)
        tower = transformers.CLIPVisionModelWithProjection(config.vision_config)
    tower.load_state_dict({name: model.state_dict()[name] for name in tower.state_dict()})
    tower.save_pretrained(images)
    model.save_pretrained(whole)
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (whole / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (whole / "merges.txt").write_text("#version: 0.2\n")
    (whole / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (whole / "special_tokens_map.json").write_text("{}")
    transformers.CLIPImageProcessor().save_pretrained(whole)
    return images, whole
