"""Triton kernels for CUDA GPUs; the tests compare each kernel with a twin in plain PyTorch.

`field` holds the radiance field, which the teacher's training (`teacher`) and the renderer
(`rendering`) share; `student` holds the student's training. Triton comes only with torch's CUDA
builds, so every module but `availability` and `cuda_graph` may be imported only after
`train.kernels.availability.reason` returned None.
"""
