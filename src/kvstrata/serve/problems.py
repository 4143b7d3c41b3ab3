"""What goes wrong in a request, in the form in which OpenAI's API says it."""

from __future__ import annotations

from typing import Any

__all__ = ["Problem"]


class Problem(Exception):
    """A request that isn't served: {"error": {"message", "type", "param", "code"}} with an HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """What the client is sent."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After, where another try may go better."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}

    @classmethod
    def full(cls, waiting: int, retry_after: int) -> Problem:
        """Too many requests wait already."""
        return cls(
            f"{waiting} requests are waiting for this worker already; try again in {retry_after} s",
            status=429, kind="rate_limit_error", code="queue_full", retry_after=retry_after,
        )  # fmt: skip

    @classmethod
    def stopping(cls) -> Problem:
        """The server is being shut down."""
        return cls("the server is shutting down", status=503, kind="server_error", code="shutting_down", retry_after=1)

    @classmethod
    def internal(cls) -> Problem:
        """Something that is no fault of the client's; the log has what."""
        return cls("the server failed at this request; its log says why", status=500, kind="server_error")
