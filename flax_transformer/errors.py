"""Tells kinds of errors apart: this library's own, and those of a device whose memory is full."""

import dis

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # XLA's word for it


def is_own(error: Exception) -> bool:
    """Whether an error is a ValueError that this library raised: it says what to do, and is about what was given.

    One that comes from a built-in function, such as `int`, is a mistake of this library, which called it. The traceback
    ends in the library's function then, too, but not at a `raise`.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not isinstance(error, ValueError):
        return False
    code, module = last.tb_frame.f_code, str(last.tb_frame.f_globals.get("__name__", ""))
    return module.startswith("flax_transformer.") and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory, for running a program or for compiling it."""
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY in str(error)
