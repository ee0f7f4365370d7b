"""Predicts, without the devices, the memory, communication and speed of a training step."""
