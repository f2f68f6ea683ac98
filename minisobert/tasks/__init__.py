"""The downstream tasks, one file each: read, label, split."""
