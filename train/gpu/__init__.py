"""Kernels in Triton for CUDA GPUs; every one has a twin in plain PyTorch that it is tested against.

Nothing here may be imported before `train.gpu.availability.usable` has said yes: Triton comes with
torch's CUDA builds only.
"""
