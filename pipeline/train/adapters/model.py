"""A frozen UNet with the trainable parts of one adapter."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn import functional

from pipeline.train.adapters.attention import install
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


class _ChannelsLast(torch.autograd.Function):
    """The same values in channels_last, forward and backward."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


def suit_compiler(unet: Any) -> None:
    """Write anew what diffusers' UNet does in a form that torch compiles well; the values are the same.

    As torch traces them, group norms and every `contiguous` leave channels_last, and each convolution behind them
    copies its input or gradient, some twice. GEGLU's gradient is written as one tensor of two halves, which takes three
    times as long as its bytes need. Of a step of SD1.5 the norms cost 8 %, the other copies 5 %, GEGLU 4 %.
    """

    def norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return functional.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
        x = _channels_last(x)
        return _channels_last(functional.group_norm(x, module.num_groups, module.weight, module.bias, module.eps))

    def convolution(module: nn.Conv2d, x: Tensor) -> Tensor:
        return _channels_last(module._conv_forward(_channels_last(x), module.weight, module.bias))

    def geglu(module: GEGLU, x: Tensor) -> Tensor:
        halves = zip(module.proj.weight.chunk(2), module.proj.bias.chunk(2), strict=True)
        hidden, gate = (functional.linear(x, weight, bias) for weight, bias in halves)
        return hidden * functional.gelu(gate)

    unet.to(memory_format=torch.channels_last)
    suited: dict[type, Callable[..., Tensor]] = {nn.GroupNorm: norm, nn.Conv2d: convolution, GEGLU: geglu}
    for module in unet.modules():
        if type(module) in suited:
            module.forward = partial(suited[type(module)], module)


def _channels_last(x: Tensor) -> Tensor:
    changed: Tensor = _ChannelsLast.apply(x)  # type: ignore[no-untyped-call]
    return changed
