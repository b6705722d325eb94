"""Export of a trained student to ONNX, CoreML and Lens Studio."""
