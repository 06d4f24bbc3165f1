"""Synthetic pages, the training of the mini checkpoint, and every measurement of this project."""
