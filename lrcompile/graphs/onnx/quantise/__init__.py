"""Post-training quantisation: a calibrated float model with Q/DQ pairs, and any such model in integers."""

from lrcompile.graphs.onnx.quantise.insert import quantise
from lrcompile.graphs.onnx.quantise.lower import integer_model, is_quantised

__all__ = ["integer_model", "is_quantised", "quantise"]
