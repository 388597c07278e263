"""What may befall an answer on its way, and whether it goes on afterwards (R5).

    cause     what happened                                       attempt   death
    died      the worker's stream broke: killed, crashed, reset      x        x
    hung      its step loop stood still                              x        x
    engine    a step with this request in it raised                  x        x
    silent    stopped or cut off                                     x
    replaced  a newer start of it has joined                         x
    transfer  KV did not arrive whole, or its landing expired        x
    gap       a token is missing                                     x
    drained   it was told to end and gave the request back

A request has three attempts. Deaths count apart, because the request itself may be what kills: one
that was there when two workers died gets no third. After the first death it is a suspect, and goes
where no other suspect is if it can, so that the innocent do not die beside the one that kills.
"""

from __future__ import annotations

from typing import Final

from cluster.errors import BatonError, EngineFailed, TokenLost, TransferFailed, WorkerLost

MAX_ATTEMPTS: Final = 3
MAX_DEATHS: Final = 2

_DEATHS: Final = frozenset({"died", "hung", "engine"})


class GivenBack(BatonError):
    """A draining worker has run out of time and lets another one go on."""

    code = "given_back"


def cause_of(error: BatonError) -> str:
    """In one word; empty for what no further attempt would mend."""
    match error:
        case WorkerLost():
            return error.cause
        case TransferFailed():
            return "transfer"
        case EngineFailed():
            return "engine"
        case GivenBack():
            return "drained"
        case TokenLost():
            return "gap"
    return ""


class Losses:
    """How often one request was lost."""

    def __init__(self) -> None:
        self._attempts = 0
        self._deaths = 0

    def count(self, error: BatonError, computing: bool = True) -> str:
        """The cause. Raises what the client is told if this was once too often: to try again,
        unless two workers died of it.

        Without `computing` nothing of the request had been computed there: it killed nobody.
        """
        cause = cause_of(error)
        if not cause:
            raise error
        self._attempts += cause != "drained"
        self._deaths += computing and cause in _DEATHS
        if self._deaths >= MAX_DEATHS:
            raise EngineFailed("The engine could not complete this request.") from error
        if self._attempts >= MAX_ATTEMPTS:
            if error.retry:
                raise error
            raise WorkerLost("The workers of this request failed. Please try again.") from error
        return cause

    @property
    def suspect(self) -> bool:
        return self._deaths > 0

    def __bool__(self) -> bool:
        return self._attempts > 0
