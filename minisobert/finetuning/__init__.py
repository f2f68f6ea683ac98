"""Fine-tuning: one loop for models of ours and of Hugging Face, a floor without a network, one report for all."""
