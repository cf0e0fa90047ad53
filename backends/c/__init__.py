"""Plain C for microcontrollers: from a graph to firmware that is proven to fit by execution."""
