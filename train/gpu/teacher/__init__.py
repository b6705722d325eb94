"""The teacher's training in kernels."""
