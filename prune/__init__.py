"""The search for the best student within a latency budget that the device itself measures."""
