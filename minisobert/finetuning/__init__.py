"""Fine-tuning: one loop for our models and Hugging Face's, a baseline without a network, one report for all."""
