"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import rxt_kernels

MODULES = ["rxt_kernels"] + sorted(
    module.name for module in pkgutil.walk_packages(rxt_kernels.__path__, "rxt_kernels.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
