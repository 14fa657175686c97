"""What can go wrong, and what the caller can do about it."""

from enum import IntEnum

from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import types_pb2 as types


class Code(IntEnum):
    """What kind of trouble a refusal is: google.rpc.Code, the same as on gRPC."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Refused(Exception):
    """What a refusal says, on gRPC or on the fd socket. Nothing was changed, unless the
    reason says otherwise."""

    def __init__(self, code: Code, reason: str | None, message: str, metadata: dict[str, str]):
        super().__init__(f"{code.name} {reason}: {message} {metadata}")
        self.code = code
        # A name of ErrorReason without its prefix; None if the daemon gave none.
        self.reason = reason
        self.message = message
        self.metadata = metadata

    @classmethod
    def of_frame(cls, refusal: types.Refusal) -> "Refused":
        reason = types.ErrorReason.Name(refusal.reason).removeprefix("ERROR_REASON_")
        return cls(Code(refusal.code), reason, refusal.message, dict(refusal.metadata))


class SessionEnded(Exception):
    """The session is over. What it has mapped is to be let go of: then Session.detach says so."""

    def __init__(self, reason: int, message: str):
        super().__init__(f"{fd.EndReason.Name(reason)}: {message}")
        self.reason = reason


class ProtocolError(Exception):
    """The service said what the protocol does not allow. Close the session."""


class NotMapped(LookupError):
    """Nothing is mapped at an address of the range. Nothing was read or written."""

    def __init__(self, at: int):
        super().__init__(f"nothing is mapped at {at:#x}")
        self.at = at


class NotAllowed(PermissionError):
    """A part of the range may not be used like this. Nothing was read or written."""

    def __init__(self, at: int, why: str):
        super().__init__(f"{why} at {at:#x}")
        self.at = at
