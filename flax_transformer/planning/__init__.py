"""Finds out, without the devices, what a training step needs of them."""
