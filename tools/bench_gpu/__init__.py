"""Benchmark of the Triton kernels and of the training on this machine's GPU (`make bench-gpu`)."""
