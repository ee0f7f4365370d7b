"""How the processes of a training find each other, keep others out, and end together."""
