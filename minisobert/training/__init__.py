"""What turns a model and micro-batches into a run: optimizer, schedule, checkpoints, figures."""
