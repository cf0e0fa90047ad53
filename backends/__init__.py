"""Targets that ship with lrcompile, one a file; found by name through entry points."""
