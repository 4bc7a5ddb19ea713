"""Training loops on transformers' Trainer."""
