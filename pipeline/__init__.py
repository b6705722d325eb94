"""The top floor: the only place that wires the stages together."""

import os

# Read by OpenMP when torch loads it: how long a thread that waits for the others spins before it
# sleeps. By default it spins so long that on shared cores a step can take thirty times as long; if
# it never spins, waking it costs as much as the second core gains. On two idle cores a training
# step
# of the tiny student took 51 ms by default, 52 ms with this, and 79 ms without spinning.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# ONNX Runtime would tell its maker about each session; nothing leaves this machine unasked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
