"""Modules that call ``torch.nn.functional.scaled_dot_product_attention`` themselves: how they are found without being
run, and how their calls are given to fastseq.

For :func:`fastseq.patch`. As there, only a module's class changes: to a subclass whose ``forward`` is the module's own
under a ``TorchFunctionMode``, which torch keeps for each thread and torch.compile traces. The mode costs every call of
torch under it 1 to 2 us, so it is given to the modules that call attention, not to the whole model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fastseq.attn.functional import scaled_dot_product_attention
from fastseq.swapped import swapped

_NAME = "scaled_dot_product_attention"
_PLAIN = {torch.Tensor, nn.Parameter}


class _ToFastseq(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and _PLAIN.issuperset(types):
            function = scaled_dot_product_attention
        elif function is torch.Tensor.unflatten and torch.compiler.is_compiling():
            function = torch.unflatten  # Dynamo before torch 2.14 cannot trace the method under a mode
        return function(*args, **(kwargs or {}))


@functools.cache
def redirected(cls: Any) -> type[nn.Module]:
    """A module's class, with its calls of torch's attention given to fastseq."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _ToFastseq():
            return cls.forward(self, *args, **kwargs)

    return swapped(redirected, (cls,), cls, (cls,), forward=forward, _redirected=True)


def is_redirected(module: nn.Module) -> bool:
    """Whether the module's class is one that :func:`redirected` made, or derives from one."""
    return hasattr(type(module), "_redirected")


def calls_torch(module: nn.Module) -> bool:
    """Whether the code of a module's ``forward``, or of what it calls, names torch's function.

    Followed are methods, functions that the code sees by name, decorated ones, and objects that the module holds.
    Child modules count for themselves. A branch that is never taken counts; what is called by a computed name does not.
    """
    return any(_names_torch(function) for function in _reached(module))


def _names_torch(function: FunctionType) -> bool:
    """Whether the code names it, and this is not a module that has ours under that name."""
    if _NAME not in _names(function.__code__):
        return False
    meant = [vars(x).get(_NAME) for x in _seen_by(function) if isinstance(x, ModuleType)]
    meant.append(function.__globals__.get(_NAME))
    return not any(x is scaled_dot_product_attention for x in meant)


def _reached(module: nn.Module) -> Iterator[FunctionType]:
    waiting: list[Any] = [vars(module).get("forward", type(module).forward)]
    done = set()
    while waiting:
        function = _function_of(waiting.pop())
        if function is None or function in done or _is_left_out(function):
            continue
        done.add(function)
        yield function
        names, seen = _names(function.__code__), _seen_by(function)
        for x in seen:
            if isinstance(x, ModuleType) and not _is_left_out(x):
                waiting += [vars(x).get(name) for name in names]
            elif type(x) is dict:
                waiting += x.values()
        waiting += seen
        waiting += [vars(module).get(name) for name in names]
        for name in names:
            methods = [vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)]
            waiting += methods if "super" in names else methods[:1]


def _function_of(x: Any) -> FunctionType | None:
    """The Python function behind a method, a partial or a callable object; None for all else."""
    if isinstance(x, functools.partial):
        return _function_of(x.func)
    if isinstance(x, (MethodType, staticmethod, classmethod)):
        return _function_of(x.__func__)
    if not isinstance(x, (FunctionType, ModuleType, nn.Module, type)):
        x = next((vars(cls)["__call__"] for cls in type(x).__mro__ if "__call__" in vars(cls)), None)
    return x if isinstance(x, FunctionType) else None


def _is_left_out(x: Any) -> bool:
    """Whether a function or module is of torch or of this package."""
    name = getattr(x, "__module__", None) or getattr(x, "__name__", "")
    return str(name).split(".")[0] in ("torch", "fastseq")


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """What code calls by name, its inner functions included."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _seen_by(function: FunctionType) -> list[Any]:
    """What a function's names stand for, in its file and around it."""
    around = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return around + [function.__globals__.get(name) for name in _names(function.__code__)]
