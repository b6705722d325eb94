"""Kernels of the radiance field, used by the teacher's training and by its renderer."""
