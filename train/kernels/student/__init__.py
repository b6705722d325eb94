"""The student's training in kernels."""
