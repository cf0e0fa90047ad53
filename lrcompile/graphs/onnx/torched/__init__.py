"""An ONNX graph computed by torch, for what ONNX Runtime cannot give: gradients.

Used while a model is being compressed, never for its results: those are ONNX Runtime's.
"""
