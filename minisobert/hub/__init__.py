"""Hugging Face's format: exports our models as folders that its libraries load, and imports such folders."""
