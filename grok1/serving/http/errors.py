"""Errors in the form of OpenAI's API."""

import dataclasses


@dataclasses.dataclass
class ApiError(Exception):
    """An error that a client gets.

    status: of HTTP. message: one sentence. param: the field that is wrong. code, kind: names that
    clients know, as in OpenAI's API. retry: after how many seconds to try again, if that may help.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    kind: str = "invalid_request_error"
    retry: int | None = None

    def headers(self) -> dict[str, str]:
        """Return the headers of the answer."""
        return {} if self.retry is None else {"retry-after": str(self.retry)}

    def body(self) -> dict[str, object]:
        """Return the body of the answer, for JSON."""
        return {
            "error": {
                # A name in it may have half of a surrogate pair, which JSON can have.
                "message": self.message.encode(errors="replace").decode(),
                "type": self.kind,
                "param": self.param and self.param.encode(errors="replace").decode(),
                "code": self.code,
            }
        }


def closing() -> ApiError:
    """Return the error while the server ends."""
    message = "the server is about to end; try again when it has been started again"
    return ApiError(503, message, code="service_unavailable", kind="server_error")


def failed(reason: str | None) -> ApiError:
    """Return the error of a request whose answer failed."""
    return ApiError(500, reason or "an answer failed", code="internal_error", kind="server_error")
