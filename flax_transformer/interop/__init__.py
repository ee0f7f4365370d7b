"""Takes models of other libraries and leaves ours, and goes the way back."""
