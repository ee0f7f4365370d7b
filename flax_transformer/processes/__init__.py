"""The processes of a training: how they find each other, lock the work directory, and stop on signals."""
