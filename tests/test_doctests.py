"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from inspect import isfunction

import pytest
import rxt_benchmarks

import rxt_kernels
import rxt_model

MODULES = sorted(
    name
    for package in (rxt_kernels, rxt_model, rxt_benchmarks)
    for name in (
        package.__name__,
        *(module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")),
    )
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    # Names that an example may use without importing them are those of the module itself.
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", [name for name, public in vars(rxt_kernels).items() if isfunction(public)])
def test_every_public_operation_has_an_example(name: str) -> None:
    assert ">>> " in (getattr(rxt_kernels, name).__doc__ or "")
