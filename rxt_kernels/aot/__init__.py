"""What the Triton kernels cost, read from the code that compilers make of them, on a machine without a GPU.

``python -m rxt_kernels.aot --target sm_90`` compiles every kernel at the shapes of every published model and reports
registers, spills, shared memory, occupancy, matrix instructions in innermost loops, how wide global memory is touched,
and the time that bytes and operations imply. Nothing is run, and no time in the report has been measured.
"""

from rxt_kernels.aot.cases import Case, all_cases
from rxt_kernels.aot.compiler import Compiled, compile_job, job_of
from rxt_kernels.aot.targets import TARGETS, Target

__all__ = ["TARGETS", "Case", "Compiled", "Target", "all_cases", "compile_job", "job_of"]
