"""From a data dump to micro-batches of packed rows. Nothing here imports torch, except `loader`."""
