"""Implementations of the multiresolution hash encoding of Instant-NGP."""
