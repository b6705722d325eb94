"""The top package: wires the stages together, and holds the command line and the report."""

import os

# How long an OpenMP thread that waits for the others spins before it sleeps; OpenMP reads it when
# torch loads. By default it spins so long that on shared cores a step can take thirty times as
# long. Without spinning, waking a thread costs as much as the second core gains. A step of the tiny
# student on two idle cores took 51 ms by default, 52 ms with this value, 79 ms without spinning.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# ONNX Runtime sends telemetry to its vendor by default.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
