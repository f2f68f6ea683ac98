"""minisobert: BERT encoders pre-trained from scratch for one domain, in plain PyTorch."""
