"""Whole studies at the paper's size, each one command."""
