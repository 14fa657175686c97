"""Counts checks, and reads what a refusal says."""

import os
import sys
import time
import traceback

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

# h2 refuses a path as authority, and a path is what grpcio sends for `unix:`.
AUTHORITY = ("grpc.default_authority", "localhost")
# Long for a call that hangs, short for whoever waits for the answer.
TIMEOUT_SECONDS = 20


class Report:
    """One line for each verified thing, and a last one that counts them."""

    def __init__(self):
        self.passed = 0
        self.failed = 0

    def check(self, what):
        return _Check(self, what)

    def close(self):
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        return self.failed == 0


class _Check:
    """A block that passes if nothing in it raises. The next one runs anyway."""

    def __init__(self, report, what):
        self.report = report
        self.what = what
        self.note = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.report.passed += 1
            note = f" ({self.note})" if self.note else ""
            print(f"ok    {self.what}{note}", flush=True)
            return True
        if not issubclass(kind, Exception):
            return False
        self.report.failed += 1
        print(f"FAIL  {self.what}", flush=True)
        traceback.print_exception(kind, error, trace, file=sys.stdout)
        return True


def socket_path(runtime_dir, name):
    return os.path.join(runtime_dir, *name.split("/"))


def channel(runtime_dir, name, options=(AUTHORITY,)):
    """A channel to one of the daemon's gRPC sockets, as a foreign client makes it."""
    return grpc.insecure_channel(f"unix:{socket_path(runtime_dir, name)}", options=options)


def same(got, wanted):
    assert got == wanted, f"{got!r} instead of {wanted!r}"


class Refused(Exception):
    """What a refusal says, on gRPC or on the fd socket."""

    def __init__(self, code, reason, message, metadata):
        super().__init__(f"{code.name} {reason}: {message} {metadata}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = metadata

    @classmethod
    def of_call(cls, error):
        """Reads google.rpc.Status with its one ErrorInfo out of the trailers."""
        status = rpc_status.from_call(error)
        if status is None:
            return cls(error.code(), None, error.details(), {})
        same(status.code, error.code().value[0])
        same(len(status.details), 1)
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info), status.details[0].type_url
        same(info.domain, "domaind")
        return cls(error.code(), info.reason, status.message, dict(info.metadata))


def call(method, request, **arguments):
    """Calls with a deadline; a refusal comes as Refused."""
    arguments.setdefault("timeout", TIMEOUT_SECONDS)
    try:
        return method(request, **arguments)
    except grpc.RpcError as error:
        raise Refused.of_call(error) from error


def refusal(work, code, reason, **numbers):
    """`work` must be refused like this, with these numbers in the metadata."""
    try:
        answer = work()
    except Refused as refused:
        same((refused.code, refused.reason), (code, reason))
        shown = {key: refused.metadata.get(key) for key in numbers}
        same(shown, {key: str(value) for key, value in numbers.items()})
        assert refused.message, "a refusal without a sentence"
        return refused
    raise AssertionError(f"not refused: {answer}")


def eventually(what, condition, seconds=10):
    """Waits for what the daemon does in the background."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.02)
