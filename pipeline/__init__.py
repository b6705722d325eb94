"""The top floor: the only place that wires the stages together."""

import os

# Before torch is imported: OpenMP threads that wait by spinning starve each other, and everything
# else, when the cores are shared; with a busy neighbour a step can take thirty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
