"""Hugging Face's format: what a model of ours is called there, and a folder that its libraries load."""
