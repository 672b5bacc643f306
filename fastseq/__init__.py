"""Accelerated RNN, GRU, LSTM and attention layers for PyTorch, drop-in for torch.nn.

    import fastseq
    fastseq.patch(model)          # every torch.nn recurrent and attention layer in the model now runs here

or use the layers themselves, ``fastseq.nn.LSTM`` and its siblings, which take torch.nn's arguments and state_dicts.
"""

from fastseq import flops, functional, installed, integrations, nn, ops
from fastseq.attn.cache import KVCache
from fastseq.backend import BackendError, backends, explain, use_backend
from fastseq.calibration.record import calibrate
from fastseq.calibration.session import CalibrationError
from fastseq.checks import ArgumentError
from fastseq.functional import attention, merge_attention, scaled_dot_product_attention
from fastseq.patch import Report, patch, unpatch
from fastseq.streams import Streams

__version__ = "0.2.0"

flops.register()
if ops.NATIVE_MISSING is not None:
    installed.warn_without_kernels(ops.NATIVE_MISSING)

__all__ = [
    "ArgumentError",
    "BackendError",
    "CalibrationError",
    "KVCache",
    "Report",
    "Streams",
    "attention",
    "backends",
    "calibrate",
    "explain",
    "functional",
    "integrations",
    "merge_attention",
    "nn",
    "patch",
    "scaled_dot_product_attention",
    "unpatch",
    "use_backend",
]
