"""`Refusal`, the answer to a request that is not served: a status and one line that says what to do."""


class Refusal(Exception):
    """Ends a request with an error that its sender gets as `{"error": message}`.

    Attributes:
        status: the HTTP status.
        message: what is wrong, which value it has, and the mend.
        reason: one word for the metrics, e.g. "queue_full".
        retry_after: seconds after which trying again makes sense; `None` if it does not.
    """

    def __init__(self, status: int, message: str, *, reason: str = "invalid", retry_after: float | None = None):
        """Takes what the attributes say."""
        super().__init__(message)
        self.status, self.message, self.reason, self.retry_after = status, message, reason, retry_after
