"""Time of each GPU kernel beside the bytes and operations that it cannot do without."""
