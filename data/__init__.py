"""Prepares data for training: `python -m data.prepare`."""
