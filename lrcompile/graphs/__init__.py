"""Containers of nodes: what raises weights to expressions and puts expressions back."""
