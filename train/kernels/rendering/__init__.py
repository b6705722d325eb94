"""Kernels that render images of a trained teacher."""
