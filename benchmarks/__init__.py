"""Benchmarks of rxt-kernels, one file per question asked; installed as ``rxt_benchmarks``.

Every benchmark is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``, is listed in :data:`BENCHMARKS`
(``rxt bench NAME``), and runs alone as ``python -m rxt_benchmarks.NAME``. :data:`COMMANDS` are run in the same way and
measure nothing of their own.
"""

BENCHMARKS: dict[str, str] = {
    "scaling": "cost of a conversation against its number of turns: RxT and a stateless LLM of the same size",
    "sqa": "time of attention against its number of query heads, from MHA to extreme sparse query attention",
    "memory": "recall of facts against the number of turns since they were told",
    "drift": "what 1,000 memory updates do to a memory, with every kind of gate: size, saturation, numerical drift",
    "launches": "kernels launched per decoded token and per memory update, by Triton and by torch",
    "gpu_static": "what compilers make of the GPU kernels: registers, occupancy, loads; never timed",
    "decode": "time of one more token on the CPU, against what the machine's memory allows",
    "prefill": "time of reading a message, against what the machine's arithmetic allows",
    "update": "time of a memory update, likewise",
    "moe": "time of one layer of experts, and of the common ways to compute it with torch",
    "train": "time of a training step of the decoder",
}
"""Name of a benchmark, which is also its module, to the question it answers."""

COMMANDS: dict[str, str] = {
    "all": "a short version of everything in under ten minutes, and a report with tables and plots",
    "compare": "what changed between two results, beyond noise; --check fails if a ratio got worse",
}
"""Likewise what runs benchmarks, and what is done with results."""
