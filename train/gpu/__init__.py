"""Kernels in Triton for CUDA GPUs; every one has a twin in plain PyTorch that it is tested against.

`field` is what the teacher's training (`teacher`) and its images (`rendering`) share; `student` is
on its own. But for `availability` and `graphs` nothing here may be imported before
`train.gpu.availability.usable` has said yes: Triton comes with torch's CUDA builds only.
"""
