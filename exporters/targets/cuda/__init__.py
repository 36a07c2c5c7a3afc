"""ONNX Runtime's CUDA provider as a target of an export."""
