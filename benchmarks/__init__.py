"""Benchmarks of rxt-kernels, one file per question asked; installed as ``rxt_benchmarks``."""
