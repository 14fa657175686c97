"""A daemon's stubs, and the drivers and devices that use them."""

import uuid
import json
import os
import subprocess
import sys
from contextlib import contextmanager

from domaind.v1 import admin_pb2 as admin
from domaind.v1 import admin_pb2_grpc as admin_grpc
from domaind.v1 import domain_pb2 as domain
from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import mapping_pb2 as mapping
from domaind.v1 import types_pb2 as types

from domaind_client import session
from domaind_client.api import Api, call, channel, wire_range
from domaind_client.errors import Code, Refused
from harness import refusal

ADMIN = "admin/admin.sock"
KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
GRANULE = 4 * KIB

INVALID = Code.INVALID_ARGUMENT
RANGE = Code.OUT_OF_RANGE
EXISTS = Code.ALREADY_EXISTS
MISSING = Code.NOT_FOUND
EXHAUSTED = Code.RESOURCE_EXHAUSTED
DENIED = Code.PERMISSION_DENIED
STATE = Code.FAILED_PRECONDITION
STALE = Code.ABORTED


class Daemon(Api):
    """The stubs of one daemon, and what was learnt of its reasons."""

    def __init__(self, runtime_dir, pid):
        super().__init__(runtime_dir)
        self.dir = runtime_dir
        self.pid = pid
        self.admin = channel(runtime_dir, ADMIN)
        self.shown = set()

    def refuses(self, work, code, reason, **numbers):
        refused = refusal(work, code, reason, **numbers)
        self.shown.add(reason)
        return refused

    def create(self, name, **spec):
        spec.setdefault("bounce_bytes", MIB)
        spec.setdefault("coherent_bytes", MIB)
        request = domain.CreateDomainRequest(domain_id=name, spec=domain.DomainSpec(**spec))
        return call(self.domains.CreateDomain, request)

    def get(self, name):
        return call(self.domains.GetDomain, domain.GetDomainRequest(name=name))

    def delete(self, name, **how):
        """Deletes a domain. Sessions that do not listen, as these here, make the
        call fail and the domain go all the same: asked again it answers."""
        how.setdefault("request_id", uuid.uuid4().hex)
        request = domain.DeleteDomainRequest(name=name, **how)
        try:
            return call(self.domains.DeleteDomain, request)
        except Refused as refused:
            if refused.reason != "NOT_ACKNOWLEDGED":
                raise
        return call(self.domains.DeleteDomain, request)

    def info(self):
        stub = admin_grpc.AdminServiceStub(self.admin)
        return call(stub.GetInfo, admin.GetInfoRequest())

    def close(self):
        super().close()
        self.admin.close()


class Session(session.Session):
    """Uses the apertures, and translates nothing."""

    def __init__(self, runtime_dir, domain, role, access=types.ACCESS_READ_WRITE):
        # It never pins, and so never owes an Ack.
        super().__init__(runtime_dir, domain, role, access, ack_mode=fd.ACK_MODE_PINS)

    read = session.Session.peek
    write = session.Session.poke


class Driver:
    """A driver session, and its calls."""

    def __init__(self, daemon, name):
        self.session = Session(daemon.dir, name, types.ROLE_DRIVER)
        self.stub = daemon.mappings

    def call(self, method, request):
        return call(method, request, metadata=self.session.metadata)

    def map(self, *entries, partial=False):
        entries = [mapping.MapEntry(**entry) for entry in entries]
        return self.call(self.stub.Map, mapping.MapRequest(entries=entries, partial=partial))

    def map_one(self, **entry):
        return self.map(entry).results[0].mapping

    def unmap(self, *entries, partial=False):
        entries = [mapping.UnmapEntry(**entry) for entry in entries]
        return self.call(self.stub.Unmap, mapping.UnmapRequest(entries=entries, partial=partial))

    def unmap_one(self, mapped, **entry):
        entry = dict(iova=mapped.iova, mapping_id=mapped.mapping_id, **entry)
        return self.unmap(entry).results[0].copied_bytes

    def sync(self, mapped, **entry):
        entry = mapping.SyncEntry(iova=mapped.iova, mapping_id=mapped.mapping_id, **entry)
        return self.call(self.stub.Sync, mapping.SyncRequest(entries=[entry]))

    def alloc(self, **request):
        return self.call(self.stub.AllocCoherent, mapping.AllocCoherentRequest(**request))

    def free(self, iova, mapping_id):
        request = mapping.FreeCoherentRequest(iova=iova, mapping_id=mapping_id)
        return self.call(self.stub.FreeCoherent, request)

    def map_direct(self, *entries, **request):
        entries = [mapping.MapDirectEntry(**entry) for entry in entries]
        request = mapping.MapDirectRequest(entries=entries, **request)
        return self.call(self.stub.MapDirect, request)

    def unmap_direct(self, *ranges, **request):
        request = mapping.UnmapDirectRequest(ranges=wire_ranges(ranges), **request)
        return self.call(self.stub.UnmapDirect, request)

    def clear_map(self, *ranges, **request):
        request = mapping.ClearMapRequest(ranges=wire_ranges(ranges), **request)
        return self.call(self.stub.ClearMap, request)

    def set_map(self, *entries, **request):
        return self.call(self.stub.SetMap, mapping.SetMapRequest(entries=entries, **request))

    def stream_set_map(self, *pieces):
        pieces = [mapping.StreamSetMapRequest(**piece) for piece in pieces]
        return self.call(self.stub.StreamSetMap, iter(pieces)).outcome

    def translate(self, start, last, want=types.PERM_READ, **request):
        wanted = wire_range(start, last)
        request = mapping.TranslateRequest(range=wanted, want=want, **request)
        return self.call(self.stub.Translate, request)

    def lookup(self, start, last):
        request = mapping.LookupRequest(range=wire_range(start, last))
        return self.call(self.stub.Lookup, request)

    def reset(self, **request):
        return self.call(self.stub.ResetBounce, mapping.ResetBounceRequest(**request))

    def close(self):
        self.session.close()


class Device:
    """A device in another process."""

    def __init__(self, daemon, name):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "device.py")
        self.process = subprocess.Popen(
            [sys.executable, script, daemon.dir, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        self.welcome = self.listen()

    def listen(self):
        line = self.process.stdout.readline()
        assert line, "the device ended"
        return json.loads(line)

    def ask(self, do, **arguments):
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.listen()

    def read(self, iova, length):
        return bytes.fromhex(self.ask("read", iova=iova, length=length)["data"])

    def write(self, iova, data):
        self.ask("write", iova=iova, data=data.hex())

    def end(self):
        """Lets go of it; kills it if it does not end by itself."""
        self.process.stdin.close()
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()


def wire_ranges(ranges):
    return [wire_range(start, last) for start, last in ranges]


@contextmanager
def a_domain(daemon, name="d0", **spec):
    daemon.create(name, **spec)
    try:
        yield f"domains/{name}"
    finally:
        daemon.delete(f"domains/{name}", force=True)
