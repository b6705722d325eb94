"""A trained student as files that other runtimes load: ONNX, CoreML, a Lens Studio project."""
