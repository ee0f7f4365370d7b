"""What shows and records how a training is going."""
