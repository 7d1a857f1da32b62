"""A frozen UNet with the trainable parts of one adapter."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.train.adapters.attention import install
from pipeline.train.adapters.frozen import keep_less, suit_compiler
from pipeline.train.adapters.variants import Variant, Widths
from pipeline.train.settings import AdapterSettings

_MOST_SHAPES = 64
"""Of batches that are compiled, each by itself; torch would give up after eight."""


class AdapterModel(nn.Module):
    """The UNet whose attention layers were given an adapter; only `image_proj` and `ip_adapter` are trained."""

    def __init__(self, unet: Any, variant: Variant, widths: Widths, settings: AdapterSettings) -> None:
        """Freeze `unet` (a UNet2DConditionModel), and install the variant into it."""
        super().__init__()
        unet.requires_grad_(False)
        keep_less(unet)
        self.variant = variant
        self.widths = widths
        self.image_proj = variant.image_proj(widths, settings)
        self.ip_adapter = install(unet, lora_rank=settings.lora_rank if variant.lora else 0)
        self.unet = unet
        self.predict: Callable[..., Tensor] = self._predict
        """What `forward` calls: projection, UNet and LoRA in one."""

    def tokens(self, condition: Mapping[str, Tensor]) -> Tensor:
        """Image tokens (B, T, text) of a condition: role -> features, batch first."""
        tokens: Tensor = self.image_proj(*(condition[role] for role in self.variant.reads))
        return tokens

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        condition: Mapping[str, Tensor],
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The UNet's prediction (B, 4, h, w), in the UNet's precision.

        Args:
            noisy_latents: (B, 4, h, w).
            timesteps: (B,) integers.
            text: (B, 77, text) text embeddings.
            condition: role -> features of the faces.
            added: SDXL's `text_embeds` (B, P) and `time_ids` (B, 6).
        """
        return self.predict(noisy_latents, timesteps, text, condition, added)

    def _predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        condition: Mapping[str, Tensor],
        added: Mapping[str, Tensor] | None,
    ) -> Tensor:
        tokens = self.tokens(condition)
        weight = self.unet.conv_in.weight
        # The frozen UNet computes in its own precision as it is. Autocast would take its norms and all that follows
        # them to float32 and back: twice the memory for what backward needs, and as many bytes more to move.
        with torch.autocast(weight.device.type, enabled=False):
            predicted: Tensor = self.unet(
                noisy_latents.to(weight.dtype),
                timesteps,
                encoder_hidden_states=text.to(weight.dtype),
                added_cond_kwargs=dict(added) if added else None,
                cross_attention_kwargs={"ip_hidden_states": tokens.to(weight.dtype)},
                return_dict=False,
            )[0]
        return predicted

    def compile_predict(self, batch_size: int) -> None:
        """Let `forward` run as one compiled graph; the first call compiles, and a call with another shape once more.

        Batches of other sizes, which are what is left at the end of an epoch, are computed without it.
        """
        # diffusers asks for torch's version inside, behind a cache that dynamo traces through.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`-wrapped function")
        suit_compiler(self.unet)
        # As many shapes as there are buckets; and one graph also where processes average gradients, which torch would
        # cut into pieces for them, though what is trained is small.
        torch._dynamo.config.recompile_limit = _MOST_SHAPES
        torch._dynamo.config.optimize_ddp = False
        compiled = torch.compile(self._predict, dynamic=False)

        def predict(noisy_latents: Tensor, *others: Any) -> Tensor:
            run = compiled if len(noisy_latents) == batch_size else self._predict
            return run(noisy_latents, *others)

        self.predict = predict

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters under their published flat keys, `image_proj.…` and `ip_adapter.…`."""
        parts = {"image_proj": self.image_proj, "ip_adapter": self.ip_adapter}
        return {f"{part}.{key}": value for part, module in parts.items() for key, value in module.named_parameters()}

    def switch_off(self) -> None:
        """Let the UNet be what it is without the adapter."""
        for layer in self.ip_adapter:
            vars(layer).update(scale=0.0, lora_scale=0.0)

    @torch.no_grad()
    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors under the keys of `trained`, which must be exactly these with exactly these shapes."""
        own = self.trained()
        assert own.keys() == tensors.keys(), "callers compare keys first, to say which file is wrong"
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
