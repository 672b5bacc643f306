"""Stands in for hypothesis on a machine that has a GPU and not this package: tests that need it are skipped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def _skipped(*args: Any, **kwargs: Any) -> Callable[[Callable], Callable]:
    def decorate(test: Callable) -> Callable:
        @pytest.mark.skip(reason="hypothesis is not installed")
        def replacement() -> None: ...

        replacement.__name__, replacement.__doc__ = test.__name__, test.__doc__
        return replacement

    return decorate


class settings:
    """Takes any setting, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, test: Callable) -> Callable:
        return test

    register_profile = load_profile = staticmethod(lambda *args, **kwargs: None)


class _Strategies(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: None


def install() -> None:
    """Make ``import hypothesis`` find this."""
    module, strategies = ModuleType("hypothesis"), _Strategies("hypothesis.strategies")
    vars(module).update(given=_skipped, settings=settings, strategies=strategies, __file__=__file__)
    vars(module).update(seed=_skipped, HealthCheck=())
    sys.modules.update({"hypothesis": module, "hypothesis.strategies": strategies})
