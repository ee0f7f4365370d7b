"""Tells kinds of errors apart: this library's own, and those of a device whose memory is full."""

import traceback

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # XLA's word for it


def is_own(error: Exception) -> bool:
    """Whether an error is a ValueError that this library raised: it says what to do, and is about what was given."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and str(frame.f_globals.get("__name__", "")).startswith("flax_transformer.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory, for running a program or for compiling it."""
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY in str(error)
