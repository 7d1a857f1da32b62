"""Decoupled cross-attention and LoRA as attention processors of a diffusers UNet.

Each processor's parameters carry the published names (`to_k_ip.weight`, `to_q_lora.down.weight`, …), and a ModuleList
of a UNet's processors in their order numbers them as published files do: 0, 1, 2, …, odd ones are cross-attention.
"""

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


class Lora(nn.Module):
    """A low-rank addition to a frozen Linear: `up(down(x))`, strength 1, zero at first."""

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        """Draw `down` with standard deviation 1 / rank; `up` is zero, so that nothing changes at first."""
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width_in) -> (…, width_out)."""
        return _trained(self.up, _trained(self.down, x))


class AdapterAttention(nn.Module):
    """One attention layer with (each where wanted) a LoRA on q, k, v, out, and keys and values for image tokens.

    The text attends as before; image tokens attend beside it with the same queries, and `scale` times their result is
    added before the output projection. The LoRA of k and v acts on text tokens alone. With `scale` and `lora_scale`
    zero, the layer computes exactly what it did without an adapter.
    """

    def __init__(self, attn: Attention, *, cross: bool, lora_rank: int = 0) -> None:
        """Parameters for the layer `attn`; `lora_rank` 0 is without LoRA."""
        super().__init__()
        self.scale = 1.0
        self.lora_scale = 1.0
        context, inner, width = attn.to_k.in_features, attn.to_q.out_features, attn.to_q.in_features
        if cross:
            self.to_k_ip = _copy(attn.to_k)
            self.to_v_ip = _copy(attn.to_v)
        if lora_rank:
            self.to_q_lora = Lora(width, inner, lora_rank)
            self.to_k_lora = Lora(context, inner, lora_rank)
            self.to_v_lora = Lora(context, inner, lora_rank)
            self.to_out_lora = Lora(inner, attn.to_out[0].out_features, lora_rank)
        self._cross, self._lora = cross, bool(lora_rank)

    # Not `forward`: Attention hands a processor only those keyword arguments that it finds in `__call__`.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Attention of (B, N, width) to itself, or to (B, 77, text) text and (B, T, text) image tokens.

        Raises:
            ValueError: for layouts that Stable Diffusion's UNets do not have (masks, norms inside attention).
        """
        extras = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attention_mask)
        if any(extra is not None and extra is not False for extra in extras) or attn.residual_connection:
            raise ValueError("this UNet's attention has masks or norms that Stable Diffusion's does not have")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = _heads(attn, self._project(attn.to_q, "to_q_lora", hidden_states))
        key = _heads(attn, self._project(attn.to_k, "to_k_lora", context))
        value = _heads(attn, self._project(attn.to_v, "to_v_lora", context))
        attended = scaled_dot_product_attention(query, key, value)
        if self._cross and ip_hidden_states is not None and self.scale != 0:
            # Under autocast the query may come out of a frozen layer of another precision.
            ip_key = _heads(attn, _trained(self.to_k_ip, ip_hidden_states)).to(query.dtype)
            ip_value = _heads(attn, _trained(self.to_v_ip, ip_hidden_states)).to(query.dtype)
            attended = attended + self.scale * scaled_dot_product_attention(query, ip_key, ip_value)
        attended = attended.transpose(1, 2).flatten(2).to(query.dtype)
        out: Tensor = attn.to_out[1](self._project(attn.to_out[0], "to_out_lora", attended))
        return out

    def _project(self, frozen: nn.Module, lora: str, x: Tensor) -> Tensor:
        projected: Tensor = frozen(x)
        if self._lora and self.lora_scale != 0:
            projected = projected + self.lora_scale * getattr(self, lora)(x)
        return projected


def _copy(frozen: nn.Linear) -> nn.Linear:
    """A trainable copy without bias, in float32: the published initial value of `to_k_ip` and `to_v_ip`."""
    copy = nn.Linear(frozen.in_features, frozen.out_features, bias=False, device=frozen.weight.device)
    copy.weight.data.copy_(frozen.weight.data)
    return copy


def _trained(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer without bias whose weights stay float32, computed in the precision of `x`, that of the frozen UNet."""
    return linear(x, layer.weight.to(x.dtype))


def _heads(attn: Attention, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)


def named_attention(unet: Any) -> Iterator[tuple[str, Attention]]:
    """Attention layers of a UNet by path, in the order of `unet.attn_processors`, which published files number."""
    for name in unet.attn_processors:
        path = name.removesuffix(".processor")
        yield path, unet.get_submodule(path)


def install(unet: Any, *, lora_rank: int = 0) -> nn.ModuleList:
    """Give each attention layer of `unet` an adapter and return them in their order.

    Cross-attention layers (`attn2`) get keys and values for image tokens; with `lora_rank` every layer gets a LoRA.
    """
    processors = {
        f"{path}.processor": AdapterAttention(attn, cross=path.endswith("attn2"), lora_rank=lora_rank)
        for path, attn in named_attention(unet)
    }
    unet.set_attn_processor(dict(processors))  # it empties what it is given
    return nn.ModuleList(processors.values())
