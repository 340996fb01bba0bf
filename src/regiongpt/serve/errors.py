"""Errors of the API: a status, and a body in OpenAI's shape."""

import json

from starlette.exceptions import HTTPException
from starlette.responses import Response

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refused or failed request.

    Args:
        status: HTTP status.
        message: one line: what is wrong and what to do.
        code: what a program can tell it by, such as the limit's name.
        param: the field that is wrong.
        wait: seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, wait: int | None = None
    ) -> None:
        headers = {} if wait is None else {"Retry-After": str(wait)}
        super().__init__(status, message, {"WWW-Authenticate": "Bearer"} if status == 401 else headers)
        kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
        self.body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})

    def response(self) -> Response:
        """The error as a response."""
        return Response(self.body, self.status_code, dict(self.headers or {}), "application/json")


def over(limit: str, most: float, got: str, status: int = 400, param: str | None = None) -> ApiError:
    """The error of a request beyond a limit."""
    return ApiError(status, f"{got}, at most {most:,.0f} ({limit})", limit, param)


def too_slow() -> ApiError:
    """The error of a request beyond its time."""
    return ApiError(408, "the request took too long (max_seconds)", "max_seconds")
