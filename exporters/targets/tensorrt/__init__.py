"""TensorRT and TensorRT-RTX as a target of an export."""
