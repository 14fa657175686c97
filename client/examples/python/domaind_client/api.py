"""Calls over gRPC."""

import os
from contextlib import contextmanager

import grpc
from domaind.v1 import domain_pb2_grpc, mapping_pb2_grpc, session_pb2_grpc, types_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from domaind_client import TIMEOUT_SECONDS
from domaind_client.errors import Code, Refused

# The daemon's HTTP/2 refuses a path as authority, and a path is what grpcio sends for `unix:`.
AUTHORITY = ("grpc.default_authority", "localhost")
PUBLIC = "public/api.sock"


class Api:
    """The services of a daemon's public socket."""

    def __init__(self, runtime_dir: str):
        self.channel = channel(runtime_dir, PUBLIC)
        self.domains = domain_pb2_grpc.DomainServiceStub(self.channel)
        self.mappings = mapping_pb2_grpc.MappingServiceStub(self.channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()


def channel(runtime_dir: str, name: str, options=(AUTHORITY,)) -> grpc.Channel:
    """A channel to one of the daemon's gRPC sockets."""
    return grpc.insecure_channel(f"unix:{socket_path(runtime_dir, name)}", options=options)


def socket_path(runtime_dir: str, name: str) -> str:
    return os.path.join(runtime_dir, *name.split("/"))


def call(method, request, **arguments):
    """Calls with a deadline; a refusal comes as Refused."""
    arguments.setdefault("timeout", TIMEOUT_SECONDS)
    with refusals():
        return method(request, **arguments)


@contextmanager
def refusals():
    """Turns what gRPC raises into Refused. Also around `future.result()`."""
    try:
        yield
    except grpc.RpcError as error:
        raise refused(error) from error


def refused(error: grpc.RpcError) -> Refused:
    """Reads google.rpc.Status with its one ErrorInfo out of the trailers."""
    code = Code(error.code().value[0])
    status = rpc_status.from_call(error)
    if status is None:
        return Refused(code, None, error.details(), {})
    info = error_details_pb2.ErrorInfo()
    is_ours = len(status.details) == 1 and status.details[0].Unpack(info)
    if not is_ours or info.domain != "domaind":
        return Refused(code, None, status.message, {})
    return Refused(code, info.reason, status.message, dict(info.metadata))


def wire_range(start: int, last: int) -> types_pb2.IovaRange:
    return types_pb2.IovaRange(start=start, last=last)
