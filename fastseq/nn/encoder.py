"""The layer of a transformer's encoder, drop-in for ``torch.nn.TransformerEncoderLayer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq import direct
from fastseq.attn import multihead
from fastseq.attn.functional import attention
from fastseq.backend import native_attention
from fastseq.checks import refuse_script
from fastseq.dtensor import any_dtensor
from fastseq.nn.attention import MultiheadAttention

_PARTS = {
    **dict.fromkeys(("linear1", "linear2"), nn.Linear),
    **dict.fromkeys(("norm1", "norm2"), nn.LayerNorm),
    **dict.fromkeys(("dropout", "dropout1", "dropout2"), nn.Dropout),
}
_COLUMNS = 32  # the kernel's outputs are a multiple of it
_FEWEST_ROWS = 256  # fewer do not pay for packing the weights


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and two linear layers (Vaswani et al. 2017): constructor, attributes, state_dict and call of
    :class:`torch.nn.TransformerEncoderLayer`.

    It differs in this: in evaluation, too, its attention is :class:`fastseq.nn.MultiheadAttention`, so that a position
    to which every key is masked has finite values; hooks and replaced parts are honoured; and
    ``is_causal=True`` needs no ``src_mask`` beside it. In float32 on the CPU and without gradients it is three native
    calls, with everything between the products inside of them.

    Shapes: src ``[S, N, E]``, with ``batch_first`` ``[N, S, E]``, unbatched ``[S, E]``; in evaluation also a nested
    tensor of ``[S, E]``, as :class:`torch.nn.TransformerEncoder` makes of a padded batch. The output is as src.

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True).eval()
        >>> layer(torch.randn(2, 50, 64)).shape
        torch.Size([2, 50, 64])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, as src.

        Args:
            src: see the class.
            src_mask: ``[S, S]`` or ``[N * heads, S, S]``: bool, True hides the pair; or floating, added to scores.
            src_key_padding_mask: ``[N, S]`` (``[S]`` unbatched): bool, True hides the key; or floating, added to
                scores.
            is_causal: position i sees positions j <= i. A ``src_mask`` beside it is taken for that same mask.
        """
        nested, masked = src.is_nested, src_mask is not None or src_key_padding_mask is not None
        if src.is_cpu and not (nested and masked) and self._is_unchanged():
            if self._is_native(src):
                return self._in_native_calls(src, src_mask, src_key_padding_mask, is_causal)
            if not masked and not is_causal and not any_dtensor((src, self.linear1.weight)):
                # few rows, or another dtype: torch's fused kernel is faster
                return super().forward(src)
        if nested or not src.is_cpu:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = src  # torch's own forward from here on, but for the masks, which it makes floating
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    if TYPE_CHECKING:
        __call__ = forward

    def _is_unchanged(self) -> bool:
        """Whether functions give in evaluation what the modules would: nothing is replaced, hooked or transformed."""
        if self.training or torch.compiler.is_compiling() or not direct.is_plain() or not native_attention():
            return False
        modules: dict[str, Any] = self._modules  # read at once: an attribute of a module takes a search
        attn = modules["self_attn"]
        out_proj = attn._modules.get("out_proj")
        if type(attn).forward is not MultiheadAttention.forward or type(out_proj).forward is not nn.Linear.forward:
            return False
        for name, cls in _PARTS.items():
            if type(modules[name]) is not cls or _is_changed(modules[name]):
                return False
        return not _is_changed(attn) and not _is_changed(out_proj) and _activation(self) != 0

    def _is_native(self, src: Tensor) -> bool:
        """Whether the native calls take an unchanged layer: no gradient is wanted, ``fastseq::feed_forward`` takes the
        products, and there are rows enough to pay for packing the weights."""
        attn, linear1, linear2, norms = self.self_attn, self.linear1, self.linear2, (self.norm1, self.norm2)
        embed, width = attn.embed_dim, linear1.out_features
        if type(src) is not Tensor or src.dtype is not torch.float32 or src.numel() < _FEWEST_ROWS * embed:
            return False
        if not _has_rows(src, embed):
            return False
        parts = (attn, attn.out_proj, linear1, linear2, *norms)
        parameters = [p for part in parts for p in part._parameters.values() if p is not None]
        if torch.is_grad_enabled() and any(x.requires_grad for x in (src, *parameters)):
            return False
        return (
            embed % _COLUMNS == 0 == width % _COLUMNS
            and attn._qkv_same_embed_dim
            and attn.bias_k is None
            and not attn.add_zero_attn
            and attn.in_proj_weight.shape == (3 * embed, embed)
            and attn.out_proj.weight.shape == (embed, embed)
            and linear1.weight.shape == (width, embed)
            and linear2.weight.shape == (embed, width)
            and all(norm.weight is not None and norm.weight.shape == (embed,) for norm in norms)
            and all(type(p) in (nn.Parameter, Tensor) and p.dtype is src.dtype and p.is_cpu for p in parameters)
            and all(p.is_contiguous() for p in parameters)
        )

    def _in_native_calls(self, src: Tensor, src_mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        attn, norm1, norm2 = self.self_attn, self.norm1, self.norm2
        x = (src.values() if src.is_nested else src.contiguous()).view(-1, attn.embed_dim)
        before, after = (norm1, None) if self.norm_first else (None, norm1)
        qkv = _rows(x, (attn.in_proj_weight, attn.in_proj_bias), before=before)
        if src.is_nested:
            o = self._attend_nested(qkv, src, is_causal)
        else:
            o = self._attend(qkv.view(*src.shape[:-1], -1), src, src_mask, padding, is_causal)
        x = _rows(o, (attn.out_proj.weight, attn.out_proj.bias), residual=x, after=after)
        before, after = (norm2, None) if self.norm_first else (None, norm2)
        weights = (self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)
        y = _rows(x, weights, residual=x, before=before, after=after, activation=_activation(self))
        if not src.is_nested:
            return y.view(src.shape)
        layout = src._nested_tensor_size(), src._nested_tensor_strides(), src._nested_tensor_storage_offsets()
        return torch._nested_view_from_buffer(y.view(-1), *layout)

    def _attend(
        self, qkv: Tensor, src: Tensor, src_mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        attn: Any = self.self_attn
        batched = src.dim() == 3
        if src_mask is not None and is_causal:
            src_mask = None
        mask, bias = attn._masks(padding, src_mask, src, src, batched)
        q, k, v = multihead.heads_of(qkv, attn.embed_dim, attn.num_heads, attn.batch_first)
        o = attention(q, k, v, bias=bias, mask=mask, causal=is_causal, align="top_left")
        o = o.transpose(1, 2) if batched and attn.batch_first else o.permute(2, 0, 1, 3)
        return o.reshape(-1, attn.embed_dim)

    def _attend_nested(self, qkv: Tensor, src: Tensor, is_causal: bool) -> Tensor:
        """Sequences of their own lengths, one after the other: padding is nowhere computed."""
        attn = self.self_attn
        ends = F.pad(src._nested_tensor_size()[:, 0].cumsum(0, dtype=torch.int32), (1, 0))
        q, k, v = qkv.view(-1, 3, attn.num_heads, attn.head_dim).unbind(1)
        o = attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, causal=is_causal, align="top_left")
        return o.reshape(-1, attn.embed_dim)


def _has_rows(src: Tensor, embed: int) -> bool:
    """Whether src is what torch's layer takes without an error."""
    if src.is_nested:
        return src.dim() == 3 and src.is_contiguous() and bool((src._nested_tensor_size()[:, 1] == embed).all())
    return src.dim() in (2, 3) and src.shape[-1] == embed


def _is_changed(part: nn.Module) -> bool:
    """Whether a part does something else than its class in evaluation: dropout that goes on, hooks."""
    return bool(part.training or part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)


def _activation(layer: Any) -> int:
    """The operator's number for what ``layer.activation`` does; 0 for another function."""
    function = layer.activation
    if function in (F.relu, torch.relu) or type(function) is nn.ReLU:
        return 1
    exact = type(function) is nn.GELU and function.approximate == "none"
    return 2 if function is F.gelu or exact else 0


def _rows(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    *,
    residual: Tensor | None = None,
    before: Any = None,
    after: Any = None,
    activation: int = 0,
) -> Tensor:
    """``after(residual + linear(act(linear(before(x)))))`` in one native call; with one linear layer no activation.

    ``weights``: weight and bias of each; ``before`` and ``after``: LayerNorm modules or None.
    """
    norm = before or after
    return torch.ops.fastseq.feed_forward(
        x, *weights, *(None,) * (4 - len(weights)), residual,
        *((None, None) if before is None else (before.weight, before.bias)),
        *((None, None) if after is None else (after.weight, after.bias)),
        0.0 if norm is None else norm.eps, activation,
    )  # fmt: skip
