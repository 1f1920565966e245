"""Build of rxt-kernels: pure Python today; the native CPU extension will be built here.

The benchmark suite lives in ``benchmarks/`` and is installed as ``rxt_benchmarks``, so that ``rxt bench`` finds it without
taking a general name in site-packages.
"""

from setuptools import find_packages, setup

library = find_packages(include=["rxt_kernels", "rxt_kernels.*", "rxt_model", "rxt_model.*"])
setup(
    packages=[*library, "rxt_benchmarks"],
    package_dir={"rxt_benchmarks": "benchmarks"},
)
