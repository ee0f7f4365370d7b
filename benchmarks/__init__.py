"""Programs that compare this library with others, and their results."""
