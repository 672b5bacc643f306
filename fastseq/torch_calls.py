"""Modules that call ``torch.nn.functional.scaled_dot_product_attention`` themselves: how they are found without being
run, and how their calls are given to fastseq.

For :func:`fastseq.patch`. As there, only a module's class changes: to a subclass whose ``forward`` is the module's own
under a ``TorchFunctionMode``, which torch keeps for each thread and torch.compile traces. The mode costs every call of
torch under it 1 to 2 us, so it is given to the modules that call attention, not to the whole model.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
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
_LEFT_OUT = {"torch", "fastseq", *sys.stdlib_module_names}


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
            return super(made, self).forward(*args, **kwargs)  # type: ignore[misc]

    made = swapped(redirected, (cls,), cls, (cls,), forward=forward, _redirected=True)
    return made


def is_redirected(module: nn.Module) -> bool:
    """Whether the module's class is one that :func:`redirected` made, or derives from one."""
    return hasattr(type(module), "_redirected")


def calls_torch(module: nn.Module) -> bool:
    """Whether the code of a module's ``forward``, or of what it calls, has torch's function, under whatever name.

    Followed are functions, methods, decorated ones, classes and objects that the code sees by name, that the module
    holds, or that are default arguments. Child modules count for themselves, but for their methods that the code names.
    A branch that is never taken counts; what is called by a computed name does not.
    """
    return any(x is F.scaled_dot_product_attention or _names_torch(x) for x in _reached(module))


def runs_later(module: nn.Module) -> bool:
    """Whether ``forward`` returns before its code has run: a generator's, or a coroutine's."""
    kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return any(kind(module.forward) for kind in kinds)


def _names_torch(x: Any) -> bool:
    """Whether a function's code names it, and this is not a module that has ours under that name, or the operator."""
    if not isinstance(x, FunctionType) or _NAME not in _names(x.__code__) or "aten" in _names(x.__code__):
        return False
    meant = [vars(y).get(_NAME) for y in _seen_by(x) if isinstance(y, ModuleType)]
    meant.append(x.__globals__.get(_NAME))
    return not any(y is scaled_dot_product_attention for y in meant)


def _reached(module: nn.Module) -> Iterator[Any]:
    """What ``forward`` calls, itself included, and what that calls."""
    waiting: list[tuple[Any, Any]] = [(x, module) for x in _attributes(module, "forward")[:1]]  # and whose it is
    done = set()
    while waiting:
        x, owner = waiting.pop()
        if (id(x), id(owner)) in done or (isinstance(x, FunctionType) and _is_left_out(x)):
            continue
        done.add((id(x), id(owner)))
        yield x
        if isinstance(x, FunctionType):
            waiting += _called_by(x, owner)
        elif isinstance(x, MethodType):
            waiting.append((x.__func__, x.__self__))
        else:
            waiting += [(part, owner) for part in _inside(x)]
            if not isinstance(x, (ModuleType, nn.Module, type)):
                waiting += [(call, x) for call in _attributes(type(x), "__call__")[:1]]


def _called_by(function: FunctionType, owner: Any) -> Iterator[tuple[Any, Any]]:
    """What a function's code has by name, each with the object whose method it may be."""
    names, seen = _names(function.__code__), _seen_by(function)
    yield from ((x, owner) for x in seen)
    holders, done = [owner, *seen], set()
    while holders:
        holder = holders.pop()
        if id(holder) in done or (holder is not owner and _is_left_out(holder)):
            continue
        done.add(id(holder))
        if isinstance(holder, nn.Module):
            holders += [child for name, child in holder._modules.items() if name in names]
        for name in names:
            found = _attributes(holder, name)
            found = found if "super" in names else found[:1]
            yield from ((x, holder) for x in found)
            holders += found


def _attributes(holder: Any, name: str) -> list[Any]:
    """What an object, module or class has under a name, and its base classes have, without running its code."""
    spaces = [*(holder.__mro__ if isinstance(holder, type) else (holder, *type(holder).__mro__))]
    return [own[name] for own in map(_dict_of, spaces) if name in own]


def _dict_of(x: Any) -> Mapping[str, Any]:
    """An object's own attributes; none of one that has no dictionary, or makes up its attributes."""
    own = getattr(x, "__dict__", None)
    return own if isinstance(own, Mapping) else {}


def _inside(x: Any) -> list[Any]:
    """The functions behind a decorated one, in a partial, in a descriptor, in a container."""
    if isinstance(x, (functools.partial, functools.partialmethod)):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, (staticmethod, classmethod)):
        return [x.__func__]
    if isinstance(x, property):
        return [x.fget]
    if type(x) in (list, tuple, dict):
        return [*(x.values() if isinstance(x, dict) else x)]
    return [_dict_of(x)["__wrapped__"]] if "__wrapped__" in _dict_of(x) else []


def _is_left_out(x: Any) -> bool:
    """Whether a function, module, class or object is of torch, of this package or of Python's library."""
    if not isinstance(x, (FunctionType, ModuleType, type)):
        x = type(x)
    name = getattr(x, "__module__", None) or getattr(x, "__name__", "")
    return str(name).split(".")[0] in _LEFT_OUT


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """What code calls by name, its inner functions included."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _seen_by(function: FunctionType) -> list[Any]:
    """What a function's names stand for, in its file and around it, and its default arguments."""
    around = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    around += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    # _names_torch judges torch's own name, which may be an attribute's.
    return around + [function.__globals__.get(name) for name in _names(function.__code__) - {_NAME}]
