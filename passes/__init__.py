"""Rewrites that ship with lrcompile, one idea a file; found by name through entry points."""
