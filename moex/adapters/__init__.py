"""Adapters: trainable parts that are added to a trained model, which stays fixed."""
