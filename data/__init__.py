"""Getting data ready: `python -m data.prepare`."""
