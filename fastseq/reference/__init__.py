"""The oracle: every operation in plain eager torch, for any float dtype, differentiable to any order.

Readable first. In float64 this is the truth that every kernel is held to; as the ``reference`` backend it also serves
second derivatives, which no fused kernel gives.
"""

from fastseq.reference.attention import attention
from fastseq.reference.recurrent import scan

__all__ = ["attention", "scan"]
