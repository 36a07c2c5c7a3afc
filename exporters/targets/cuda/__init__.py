"""The target for ONNX Runtime's CUDA provider."""
