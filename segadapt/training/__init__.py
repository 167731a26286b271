"""Supervised training: transforms, sampling, optimisers, parallel runs; and the training of small teachers."""
