"""Activations of a language model: harvesting, the store on disk, and reading them as batches."""
