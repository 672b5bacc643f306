"""Classes that :mod:`fastseq.patch` makes and swaps into modules: each shows itself as the class that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def swapped(maker: Callable, arguments: tuple, own: Any, bases: tuple, **names: Any) -> type[nn.Module]:
    """What ``maker(*arguments)`` returns: a class in the place of a module's ``own``, which it remembers."""
    names |= {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    made = {"_own_class": own, "_maker": staticmethod(maker), "_arguments": arguments, "__reduce_ex__": _reduce}
    return type(own.__name__, bases, names | made)


def own_class(cls: type) -> type[nn.Module] | None:
    """The class in whose place :func:`swapped` made this one; None where it did not."""
    return vars(cls).get("_own_class")


def _reduce(self: nn.Module, protocol: Any) -> tuple:
    """For copy and pickle, which cannot find a class made here by its name: what the own class says, and our class."""
    cls: Any = next(base for base in type(self).__mro__ if "_own_class" in vars(base))
    made: Any = super(cls, self).__reduce_ex__(protocol)
    if own_class(type(self)) is None:  # a subclass of ours, which is found by its name
        return made
    function, arguments, *state = made
    arguments = tuple(cls._own_class if x is cls else x for x in arguments)
    return _new, (cls._maker, cls._arguments, function, arguments), *state


def _new(maker: Callable, made_of: tuple, function: Callable, arguments: tuple) -> nn.Module:
    module = function(*arguments)
    module.__class__ = maker(*made_of)
    return module
