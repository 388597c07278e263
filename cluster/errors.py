"""Every failure Baton tells anyone about, in one tree.

Each class carries what a client sees: HTTP status, gRPC status, OpenAI error type and code, and
whether trying again may help. `gateway.app` turns it into an HTTP answer, `gateway.inference` into
a gRPC status; nothing else decides a status.
"""

from __future__ import annotations


class BatonError(Exception):
    """A failure with a meaning. The message is written for the client and holds no internals."""

    http = 500
    grpc = "INTERNAL"
    type = "internal_error"
    code = "internal_error"
    retry = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code

    def body(self) -> dict[str, object]:
        """The OpenAI error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


# The client's fault.


class BadRequest(BatonError):
    http, grpc = 400, "INVALID_ARGUMENT"
    type, code = "invalid_request_error", "invalid_value"


class Unauthorized(BatonError):
    http, grpc = 401, "UNAUTHENTICATED"
    type, code = "invalid_request_error", "invalid_api_key"


class Forbidden(BatonError):
    """A known key that may not do this."""

    http, grpc = 403, "PERMISSION_DENIED"
    type, code = "permission_error", "forbidden"


class NotFound(BatonError):
    http, grpc = 404, "NOT_FOUND"
    type, code = "invalid_request_error", "not_found"


class MethodNotAllowed(BatonError):
    http, grpc = 405, "UNIMPLEMENTED"
    type, code = "invalid_request_error", "method_not_allowed"


class RequestTimeout(BatonError):
    http, grpc = 408, "DEADLINE_EXCEEDED"
    type, code = "invalid_request_error", "request_timeout"


class IdempotencyMismatch(BatonError):
    """The key of an earlier call with another body."""

    http, grpc = 409, "ALREADY_EXISTS"
    type, code = "invalid_request_error", "idempotency_mismatch"


class Superseded(BatonError):
    """The same client, as its Idempotency-Key says, reads this answer on a newer connection."""

    http, grpc = 409, "ABORTED"
    type, code = "invalid_request_error", "superseded"


class TooLarge(BatonError):
    http, grpc = 413, "RESOURCE_EXHAUSTED"
    type, code = "invalid_request_error", "request_too_large"


class UnsupportedMedia(BatonError):
    http, grpc = 415, "INVALID_ARGUMENT"
    type, code = "invalid_request_error", "unsupported_media_type"


class Cancelled(BatonError):
    """The client went away. A normal ending; nobody is left to read the status."""

    http, grpc = 499, "CANCELLED"
    type, code = "invalid_request_error", "cancelled"


# Nobody's fault: the cluster is busy or shrinking. Trying again helps.


class Overloaded(BatonError):
    """The queue is full. Says when to come back."""

    http, grpc = 503, "RESOURCE_EXHAUSTED"
    type, code = "service_unavailable", "overloaded"
    retry = True


class RateLimited(BatonError):
    """This key has used up its share for now. Says when there will be some again."""

    http, grpc = 429, "RESOURCE_EXHAUSTED"
    type, code = "rate_limit_error", "rate_limit_exceeded"
    retry = True


class Draining(BatonError):
    """This gateway is about to end: another one, or the same a little later, will answer."""

    http, grpc = 503, "UNAVAILABLE"
    type, code = "service_unavailable", "draining"
    retry = True


class NoWorkers(BatonError):
    """No pair of workers, nor an undivided one, can take the request."""

    http, grpc = 503, "UNAVAILABLE"
    type, code = "service_unavailable", "no_workers"
    retry = True


class DeadlineExceeded(BatonError):
    http, grpc = 504, "DEADLINE_EXCEEDED"
    type, code = "timeout_error", "deadline_exceeded"
    retry = True


# Our fault, or a peer's.


class WorkerLost(BatonError):
    """The worker that held the request is gone: dead, cut off or fenced. `cause` is one word for
    the metrics (gateway.recovery)."""

    http, grpc = 503, "UNAVAILABLE"
    type, code = "service_unavailable", "worker_lost"
    retry = True

    def __init__(self, message: str, *, cause: str = "died") -> None:
        super().__init__(message)
        self.cause = cause


class TransferFailed(BatonError):
    """KV did not arrive whole: refused chunks, a cut link, an expired landing."""

    http, grpc = 503, "UNAVAILABLE"
    type, code = "service_unavailable", "transfer_failed"
    retry = True


class TokenLost(BatonError):
    """A token came that does not follow the one before it."""

    http, grpc = 503, "UNAVAILABLE"
    type, code = "service_unavailable", "token_lost"
    retry = True


class EngineFailed(BatonError):
    """A step raised. The worker reports it for each sequence that was in the step; a client is told
    when two workers died of its request."""

    code = "engine_error"


class HandshakeRefused(BatonError):
    """Two processes do not fit together; the message holds both values."""

    grpc = "FAILED_PRECONDITION"
    code = "handshake_refused"


# Before anything serves: one line on stderr, a non-zero exit, nothing left running.


class StartError(BatonError):
    """A process cannot start. The message says what to change."""

    code = "start_error"


class BadModel(StartError):
    """A model directory that cannot be served. The message names file, field and reason."""

    code = "bad_model"


# Inside one process.


class BlocksExhausted(Exception):
    """A pool has fewer free blocks than were asked for. Nothing was taken."""
