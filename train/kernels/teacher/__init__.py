"""Kernels of the teacher's training; `train.gpu_steps` combines them to steps."""
