"""Image-text models of a few kB with random weights: GIT, which only captions, and LLaVA, which chats."""

from pathlib import Path

WORDS = [
    *("<pad>", "<unk>", "<s>", "</s>", "<image>", "USER", "ASSISTANT", "describe", "this"),
    *"abcdefghijklmnopqrstuvwxyz",
]
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_CHAT = "{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT"  # noqa: E501


def write(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a model of a kind, `git` or `llava`, with its processor; the same weights for a seed."""
    import tokenizers
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        cls_token="<s>", sep_token="</s>", additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**_SMALL, "image_size": 32, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "git":
            config = transformers.GitConfig(vision_config=vision, vocab_size=len(WORDS), **_SMALL, **ids)
            model, processor = transformers.GitForCausalLM(config), transformers.GitProcessor(pictures, tokenizer)
        else:
            text = transformers.LlamaConfig(vocab_size=len(WORDS), **_SMALL, **ids)
            config = transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**vision), text_config=text, image_token_index=4
            )
            model = transformers.LlavaForConditionalGeneration(config)
            processor = transformers.LlavaProcessor(
                pictures, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=_CHAT,
                num_additional_image_tokens=1,
            )  # fmt: skip
        for parameter in model.parameters():  # random enough that pictures differ in their captions
            if parameter.ndim > 1:
                parameter.data = torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card as the hub has it.\n")
    return folder
