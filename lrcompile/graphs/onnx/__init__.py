"""ONNX graphs: safe reading, raising to expressions and writing."""
