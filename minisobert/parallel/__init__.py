"""Training on several processes, with the same trajectory. All communication between ranks is in this folder."""
