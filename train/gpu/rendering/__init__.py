"""Images of a trained teacher in kernels."""
