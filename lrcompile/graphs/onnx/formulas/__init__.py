"""ONNX operators as formulas: one table, operator → stages."""

from lrcompile.graphs.onnx.formulas.build import build

__all__ = ["build"]
