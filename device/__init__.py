"""Latency measurement of ONNX graphs on phones (over adb) and on this machine."""
