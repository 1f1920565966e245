"""What the Triton kernels cost, read from the code that compilers make of them, on a machine without a GPU.

``python -m rxt_kernels.aot --target sm_90`` compiles every kernel at the shapes of published models and reports registers,
spills, shared memory, occupancy, matrix instructions, the width of memory accesses, and the time that bytes and operations
imply. Nothing is run, and no time in the report has been measured.
"""

from rxt_kernels.aot.cases import CASES, Case
from rxt_kernels.aot.compiler import Compiled, compile_launch
from rxt_kernels.aot.targets import TARGETS, Target

__all__ = ["CASES", "TARGETS", "Case", "Compiled", "Target", "compile_launch"]
