"""The multiresolution hash encoding of Instant-NGP, one function with several implementations."""
