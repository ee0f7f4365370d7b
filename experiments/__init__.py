"""Programs that measure what tutorials say of the Transformer: one claim each."""
