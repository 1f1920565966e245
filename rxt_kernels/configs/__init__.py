"""Block sizes of Triton kernels, as data: one file per GPU architecture, and a default that every GPU can run.

A kernel's launcher asks ``block_config("sqa_fwd", query, width)`` and passes what it gets on to the kernel: block sizes,
``num_warps`` and ``num_stages``. Sizes depend on the architecture and on the width of a row (a head, or a model's width),
never on a sequence length, so that a longer sequence compiles nothing anew.

The tables of this package were chosen by reading compiled code (``python -m rxt_kernels.aot``), not by timing it. Nothing
is tuned unless asked for: :mod:`rxt_kernels.configs.autotune` measures on the GPU at hand and writes a file of the same
form, which ``RXT_KERNELS_CONFIGS=FILE`` lays over the tables of this package.
"""

from rxt_kernels.configs.tables import (
    ConfigError,
    architecture_of,
    block_config,
    for_architecture,
    kernel_names,
    load_table,
    observe_configs,
    override_config,
    rows_of,
    save_table,
)

__all__ = [
    "ConfigError",
    "architecture_of",
    "block_config",
    "for_architecture",
    "kernel_names",
    "load_table",
    "observe_configs",
    "override_config",
    "rows_of",
    "save_table",
]
