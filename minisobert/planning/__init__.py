"""Memory, traffic, time and cost of a layout, before anything runs: what `train.py --plan` prints."""
