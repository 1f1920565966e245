"""Address arithmetic, read in a kernel's intermediate code: could an offset pass 2^31 unnoticed?

An offset is a sum of products of indices and strides. A product of two numbers that are only known at run time wraps around
silently when it is taken in 32 bits, and reads or writes somewhere else. Products with a constant, such as a block size, are
indices; they stay below the 2^31 that a dimension may have.
"""

from __future__ import annotations

import re

__all__ = ["narrow_products"]

_CONSTANT = re.compile(r"(%[\w#]+) = arith\.constant ")
_PRODUCT = re.compile(r"(%[\w#]+) = arith\.muli (%[\w#]+), (%[\w#]+)(?: overflow<[\w, ]+>)? : (?:tensor<[\dx]+x)?i32>?")
_PASSED_ON = re.compile(r"(%[\w#]+) = tt\.(?:splat|broadcast|expand_dims|reshape) (%[\w#]+)")


def narrow_products(intermediate: str) -> list[str]:
    """Products of two run-time integers that are taken in 32 bits.

    Args:
        intermediate: a kernel in Triton's intermediate representation, ``compiled.asm["ttir"]``.

    Returns:
        A line of code for each; none for a kernel whose offsets may grow beyond 2^31.

    Example:
        >>> narrow_products("%place = arith.muli %row, %stride : i32")
        ['%place = arith.muli %row, %stride']
        >>> narrow_products("%place = arith.muli %row, %stride : i64")
        []
    """
    constants: set[str] = set()
    found: list[str] = []
    for line in intermediate.splitlines():
        if ((match := _PASSED_ON.search(line)) and match[2] in constants) or (match := _CONSTANT.search(line)):
            constants.add(match[1])
        elif (match := _PRODUCT.search(line)) and not constants & {match[2], match[3]}:
            found.append(f"{match[1]} = arith.muli {match[2]}, {match[3]}")
    return found
