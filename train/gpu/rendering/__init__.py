"""Pictures of a trained teacher in kernels."""
