"""Multi-head attention, drop-in for ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.attn import dtensor, multihead
from fastseq.attn.call import AttentionCall
from fastseq.attn.checks import check_strided
from fastseq.autograd import functorch_active
from fastseq.backend import explain_native
from fastseq.checks import ArgumentError, check_memory, check_tensor, refuse_script, sizes
from fastseq.dtensor import any_dtensor

_PARAMETERS = (
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v",
)  # fmt: skip


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al. 2017): constructor, attributes, state_dict and call of
    :class:`torch.nn.MultiheadAttention`.

    It differs in this: a query to which every key is masked attends to nothing and has finite gradients, where torch
    gives NaN; ``is_causal=True`` needs no ``attn_mask`` beside it; and ``need_weights=False`` stores no matrix of
    scores, forward or backward, whatever the masks.

    Shapes (E ``embed_dim``, N batch, L queries, S keys): query ``[L, N, E]``, key ``[S, N, kdim]``, value
    ``[S, N, vdim]``; with ``batch_first`` ``[N, L, E]`` and so on; unbatched ``[L, E]`` and so on. The output is laid
    out as query; the weights are ``[N, L, S]``, or ``[N, heads, L, S]`` with ``average_attn_weights=False``. The keys
    that ``add_bias_kv`` and ``add_zero_attn`` append are visible to every query, and count in S of the weights.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit; the message names the argument.
        BackendError: the backend in force was named and cannot do this.

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.nn.MultiheadAttention(16, 4, batch_first=True)
        >>> x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        >>> y, weights = layer(x, x, x, key_padding_mask=padding)
        >>> y.shape, weights.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]))
    """

    __prepare_scriptable__ = refuse_script

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ``(output, weights)``; weights is None with ``need_weights=False``.

        Args:
            query, key, value: see the class.
            key_padding_mask: ``[N, S]`` (``[S]`` unbatched): bool, True hides the key; or floating, added to scores.
            need_weights: also return the weights, which costs their matrix.
            attn_mask: ``[L, S]`` or ``[N * heads, L, S]``: bool, True hides the pair; or floating, added to scores.
            average_attn_weights: return the weights' mean over heads rather than each head's.
            is_causal: query i sees keys j <= i. An ``attn_mask`` beside it is taken for that same mask, as torch does.

        Nested tensors go to torch's own forward, which takes them in inference only.
        """
        if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
            for name, x in (("query", query), ("key", key), ("value", value)):
                check_tensor(name, x)
        if type(query) is not Tensor and any_dtensor((query, key, value)):
            return self._on_shards(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        appended = (self.bias_k is not None) + self.add_zero_attn
        if is_causal and attn_mask is not None and not need_weights and not appended:
            if isinstance(attn_mask, Tensor) and attn_mask.device != query.device:
                raise ArgumentError(f"attn_mask is on {attn_mask.device} but query on {query.device}; move one of them")
            attn_mask = None
        elif attn_mask is not None:
            is_causal = False
        batched = query.dim() == 3
        mask = bias = None
        masked = key_padding_mask is not None or attn_mask is not None
        if masked:
            self._check(query, key, value, batched)
            mask, bias = self._masks(key_padding_mask, attn_mask, query, key, batched)
        if (
            batched
            and self.batch_first
            and torch.is_grad_enabled()
            and not functorch_active()
            and not torch.compiler.is_compiling()
        ):
            query, key, value = self._own(query, key, value)
        dropout_p = self.dropout if self.training else 0.0
        if not appended and dropout_p == 0.0:
            arguments = (
                self._parameters, self._modules["out_proj"]._parameters,  # type: ignore[union-attr]
                query, key, value, bias, mask, self.num_heads, self.batch_first, is_causal,
                need_weights, average_attn_weights,
            )  # fmt: skip
            done = multihead.in_one_call(*arguments)
            if done is not None:
                return done
            explain_native("attention", multihead.in_one_call, *arguments)
        if any_dtensor(self._parameters.values()):
            return self._on_shards(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if not masked:  # the native call has its own look at shapes
            self._check(query, key, value, batched)
        for name, parameter in self._every_parameter():
            if parameter is not None and parameter.device != query.device:
                raise ArgumentError(
                    f"{name} is on {parameter.device} but query on {query.device}; move one with .to(device)"
                )
            if parameter is not None and name.endswith("bias"):
                check_memory(name, parameter)  # torch's addition would end the process
        q, k, v = self._project(query, key, value)
        if appended:
            if is_causal:  # the limit holds for the keys that came, not for those appended
                below = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
                mask, is_causal = below if mask is None else mask & below, False
            k, v, mask, bias = self._append(k, v, mask, bias, appended)

        call = AttentionCall(q, k, v, bias, mask, causal=is_causal, dropout_p=dropout_p)
        return multihead.attend(call, self, batched, need_weights, average_attn_weights)

    if TYPE_CHECKING:
        __call__ = forward

    @torch._disable_dynamo  # torch.compile breaks its graph here, as it cannot trace a layer that is made inside a call
    def _on_shards(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The call, where something is a DTensor."""
        tensors = {
            "query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask, "attn_mask": attn_mask,
        }  # fmt: skip
        settings: dict[str, Any] = {
            "need_weights": need_weights, "average_attn_weights": average_attn_weights, "is_causal": is_causal,
        }  # fmt: skip
        return dtensor.multihead(
            self, tensors, lambda shard, local: MultiheadAttention.forward(shard, **local, **settings)
        )

    def _every_parameter(self) -> Iterator[tuple[str, Tensor | None]]:
        yield from ((name, getattr(self, name)) for name in _PARAMETERS)
        yield from (("out_proj.weight", self.out_proj.weight), ("out_proj.bias", self.out_proj.bias))

    def _check(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> None:
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ArgumentError(
                "query, key and value must all be 3-D, or 2-D for one unbatched sequence, "
                f"got {sizes(query)}, {sizes(key)} and {sizes(value)}"
            )
        for name, x, want, of in (
            ("query", query, self.embed_dim, "embed_dim"),
            ("key", key, self.kdim, "kdim"),
            ("value", value, self.vdim, "vdim"),
        ):
            if x.shape[-1] != want:
                raise ArgumentError(
                    f"{name} {sizes(x)} has {x.shape[-1]} features in its last dimension, {of} is {want}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ArgumentError(
                "key and value must have the same length and batch: each key has one value; "
                f"got {sizes(key)} and {sizes(value)}"
            )
        batch = 0 if self.batch_first else 1
        if batched and query.shape[batch] != key.shape[batch]:
            raise ArgumentError(
                f"query and key must have the same batch, dimension {batch} with batch_first={self.batch_first}, "
                f"got {sizes(query)} and {sizes(key)}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v ``[N,heads,T,D]``: one product where the inputs are one tensor, two where key and value are."""
        bias, embed = self.in_proj_bias, self.embed_dim
        if self._qkv_same_embed_dim and query is key and key is value:
            return self._heads(F.linear(query, self.in_proj_weight, bias))
        if self._qkv_same_embed_dim and key is value:
            w_q, w_kv = self.in_proj_weight.split((embed, 2 * embed))
            b_q, b_kv = (None, None) if bias is None else bias.split((embed, 2 * embed))
            return *self._heads(F.linear(query, w_q, b_q)), *self._heads(F.linear(key, w_kv, b_kv))
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(
            self._heads(F.linear(x, w, b))[0] for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )

    def _own(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Copies of the inputs that a weight's gradient will be multiplied with. torch's layer transposes an input that
        is ``batch_first``, which copies it too, so the caller may change the input in place before the backward."""
        if self._qkv_same_embed_dim:
            learns: tuple[bool, ...] = (self.in_proj_weight.requires_grad,) * 3
        else:
            learns = tuple(w.requires_grad for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        copies: dict[int, Tensor] = {}
        for name, x, wanted in zip(("query", "key", "value"), (query, key, value), learns, strict=True):
            if wanted and id(x) not in copies:
                check_memory(name, x)  # torch's clone would end the process
                copies[id(x)] = x.clone()
        return tuple(copies[id(x)] if wanted else x for x, wanted in zip((query, key, value), learns, strict=True))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return multihead.heads_of(x, self.embed_dim, self.num_heads, self.batch_first)

    def _masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, query: Tensor, key: Tensor, batched: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both masks as one of bool (True: may look) and one to be added, broadcastable to [N,heads,L,S]."""
        time = 1 if batched and self.batch_first else 0
        batch, heads = query.shape[1 - time] if batched else 1, self.num_heads
        queries, keys = query.shape[time], key.shape[time]
        masks: list[Tensor] = []
        biases: list[Tensor] = []

        def place(name: str, x: Tensor, shapes: dict[str, tuple[int, ...]], view: tuple[int, ...]) -> None:
            check_tensor(name, x)
            check_strided(name, x)
            check_memory(name, x)
            if tuple(x.shape) not in shapes.values():
                expected = " or ".join(f"{layout} = {list(shape)}" for layout, shape in shapes.items())
                raise ArgumentError(f"{name} must be {expected}, got {sizes(x)}")
            if x.device != query.device:
                raise ArgumentError(f"{name} is on {x.device} but query on {query.device}; move it with .to(device)")
            if x.dtype == torch.bool:
                masks.append(~x.view(view))
            elif x.is_floating_point():
                biases.append(x.view(view))
            else:
                raise ArgumentError(
                    f"{name} must be bool (True hides) or floating, got {x.dtype}; convert with .bool()"
                )

        if key_padding_mask is not None:
            name, shape = ("[N, S]", (batch, keys)) if batched else ("[S]", (keys,))
            place("key_padding_mask", key_padding_mask, {name: shape}, (batch, 1, 1, keys))
        if attn_mask is not None:
            flat = isinstance(attn_mask, Tensor) and attn_mask.dim() == 2
            shapes = {"[L, S]": (queries, keys), "[N * heads, L, S]": (batch * heads, queries, keys)}
            place("attn_mask", attn_mask, shapes, (1 if flat else batch, 1 if flat else heads, queries, keys))
        mask = masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None
        bias = biases[0] + biases[1] if len(biases) == 2 else biases[0] if biases else None
        return mask, bias

    def _append(
        self, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, appended: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The learned key and value of add_bias_kv and the zeros of add_zero_attn, after all others."""

        def extend(x: Tensor, learned: Tensor | None) -> Tensor:
            parts = [x]
            if learned is not None:
                row = learned.to(x.dtype).view(1, self.num_heads, 1, self.head_dim)
                parts.append(row.expand(x.shape[0], -1, -1, -1))
            if self.add_zero_attn:
                parts.append(x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3]))
            return torch.cat(parts, 2)

        mask = None if mask is None else F.pad(mask, (0, appended), value=True)
        bias = None if bias is None else F.pad(bias, (0, appended))
        return extend(k, self.bias_k), extend(v, self.bias_v), mask, bias
