"""What a failed gRPC call carries beside its status: the HTTP error's code, field and Retry-After,
and the same as the standard messages that clients of other languages look for.

Source  google/rpc/error_details.proto; gRPC's richer error model (grpc-status-details-bin).
"""

from __future__ import annotations

import math

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import BatonError


def trailing_metadata(error: BatonError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """BadRequest names the field at fault, RetryInfo says when to come back."""
    plain: list[tuple[str, str | bytes]] = [
        ("x-request-id", request_id),
        ("baton-code", error.code),
    ]
    details = []
    if error.param:
        plain.append(("baton-param", error.param))
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.param, description=error.message, reason=error.code.upper()
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry:
        seconds = max(1, math.ceil(error.retry_after or 1))
        plain.append(("retry-after", str(seconds)))
        info = error_details_pb2.RetryInfo()
        info.retry_delay.seconds = seconds
        details.append(info)
    if not details:
        return tuple(plain)
    packed = [Packed() for _ in details]
    for whole, detail in zip(packed, details, strict=True):
        whole.Pack(detail)
    status = status_pb2.Status(
        code=grpc.StatusCode[error.grpc].value[0], message=error.message, details=packed
    )
    return (*plain, ("grpc-status-details-bin", status.SerializeToString()))
