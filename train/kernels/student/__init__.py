"""Kernels of the student's training; `fast_student` combines them to a step."""
