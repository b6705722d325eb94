"""The radiance field as kernels: what the teacher's training and its rendering share."""
