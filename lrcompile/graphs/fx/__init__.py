"""Exported programs (``torch.export``) as graphs of linear sites."""
