"""Everything that a foreign gRPC client may rely on, against a real daemon.

    check.py RUNTIME_DIR DAEMON_PID

The daemon must be fresh; the last check stops it. Started by tests/grpcio.sh.
"""

import fcntl
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager

import grpc
from domaind.v1 import admin_pb2 as admin
from domaind.v1 import admin_pb2_grpc as admin_grpc
from domaind.v1 import domain_pb2 as domain
from domaind.v1 import domain_pb2_grpc as domain_grpc
from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import mapping_pb2 as mapping
from domaind.v1 import session_pb2 as session_pb
from domaind.v1 import types_pb2 as types
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from clients import (
    DENIED, EXHAUSTED, EXISTS, GRANULE, INVALID, KIB, MIB, MISSING, RANGE, STATE, TIB,
    Daemon, Device, Driver, Session, a_domain,
)
from direct import direct_mappings, direct_refusals, repeated_requests, tables
from domaind_client.api import PUBLIC, call, channel, socket_path
from domaind_client.errors import Refused, SessionEnded
from domaind_client.frames import Connection
from domaind_client.memory import Buffer
from harness import Report, eventually, refusal, same

# Reasons that no well-timed test can bring about from outside today, and why.
# A new reason must be shown below or be listed here.
NOT_SHOWN = {
    "UNSPECIFIED": "not used",
    "UNATTESTED": "needs a peer in another user namespace",
    "ADMIN_ONLY": "the admin service does not exist on the public socket",
    "DOMAIN_CLOSED": "only while a delete is under way",
    "SESSION_ENDED": "only while the session ends",
    "MAPPING_BUSY": "only while a Sync is copying",
    "BOUNCE_RESET": "only while a Map is copying",
    "DRAINING": "comes with draining and hand-over",
    "NOT_ACKNOWLEDGED": "needs a session that does not listen: tests/tests/live.rs",
    "INVALIDATING": "needs a session that does not listen: tests/tests/live.rs",
    "NOT_ALLOWED": "needs a policy: tests/tests/policy.rs",
    "CONFIG_REFUSED": "needs a configuration file that is wrong: tests/tests/policy.rs",
    "MEMORY_NOT_SHAREABLE": "needs memory that the daemon may not read",
    "BUG": "a bug",
}


def main(runtime_dir, pid):
    report = Report()
    eventually("the daemon serves", lambda: serves(runtime_dir, pid), seconds=30)
    authority(report, runtime_dir)
    daemon = Daemon(runtime_dir, pid)
    before = daemon.info()
    standard_services(report, daemon)
    admin_service(report, daemon)
    domains(report, daemon)
    domain_refusals(report, daemon)
    deadlines(report, daemon)
    driver_and_device(report, daemon)
    mapping_refusals(report, daemon)
    direct_mappings(report, daemon)
    direct_refusals(report, daemon)
    tables(report, daemon)
    repeated_requests(report, daemon)
    fd_socket_refusals(report, daemon)
    ends(report, daemon)
    every_reason(report, daemon)
    nothing_left(report, daemon, before)
    stop(report, daemon)
    daemon.close()
    return report.close()


def serves(runtime_dir, pid):
    os.kill(pid, 0)
    return os.path.exists(socket_path(runtime_dir, PUBLIC))


# DESIGN.md section 8: h2 refuses the path that grpcio sends as authority.


def authority(report, runtime_dir):
    with report.check("without grpc.default_authority=localhost a call fails") as check:
        with channel(runtime_dir, PUBLIC, options=()) as foreign:
            list_domains = domain_grpc.DomainServiceStub(foreign).ListDomains
            try:
                list_domains(domain.ListDomainsRequest(), timeout=10)
            except grpc.RpcError as error:
                check.note = f"{error.code().name}: {error.details()}"
                same(error.code(), grpc.StatusCode.INTERNAL)
                # 1 is PROTOCOL_ERROR; the daemon resets the stream, not the connection.
                assert "RST_STREAM with error code 1" in error.details(), error.details()
            else:
                raise AssertionError("it works now: say so in README.md and drop the option")
    with report.check("with it the same call works"):
        with channel(runtime_dir, PUBLIC) as foreign:
            list_domains = domain_grpc.DomainServiceStub(foreign).ListDomains
            same(list(list_domains(domain.ListDomainsRequest(), timeout=10).domains), [])


def standard_services(report, daemon):
    for name, sock in ("public", daemon.channel), ("admin", daemon.admin):
        stub = health_pb2_grpc.HealthStub(sock)
        for service in "", "domaind.v1.DomainService":
            with report.check(f"health of {service or 'the daemon'!r} on the {name} socket"):
                answer = call(stub.Check, health_pb2.HealthCheckRequest(service=service))
                same(answer.status, health_pb2.HealthCheckResponse.SERVING)
    with report.check("health of an unknown service is NOT_FOUND"):
        stub = health_pb2_grpc.HealthStub(daemon.channel)
        unknown = health_pb2.HealthCheckRequest(service="no.such.Service")
        refusal(lambda: call(stub.Check, unknown), MISSING, None)

    with report.check("reflection v1alpha lists the services on the admin socket"):
        database = ProtoReflectionDescriptorDatabase(daemon.admin)
        services = set(database.get_services())
        ours = {"Domain", "Mapping", "Session", "Admin"}
        missing = {f"domaind.v1.{name}Service" for name in ours} | {"grpc.health.v1.Health"}
        assert missing <= services, services
    with report.check("reflection v1 answers on the admin socket, too"):
        # The two versions differ in their name only.
        stream = daemon.admin.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        assert "domaind.v1.DomainService" in str(next(stream(reflection_asks(), timeout=10)))
    with report.check("reflection is UNIMPLEMENTED on the public socket"):
        stub = reflection_pb2_grpc.ServerReflectionStub(daemon.channel)
        try:
            next(stub.ServerReflectionInfo(reflection_asks(), timeout=10))
        except grpc.RpcError as error:
            same(error.code(), grpc.StatusCode.UNIMPLEMENTED)
        else:
            raise AssertionError("it answered")


def reflection_asks():
    return iter([reflection_pb2.ServerReflectionRequest(list_services="")])


def admin_service(report, daemon):
    with report.check("GetInfo names the daemon, its kernel's features and its counts"):
        info = daemon.info()
        same((info.pid, info.runtime_dir), (daemon.pid, daemon.dir))
        assert info.version and len(info.instance) == 16 and info.start_time_unix_ms
        assert info.HasField("features") and info.region_budget_bytes > 0
        same((info.domains, info.sessions, info.region_bytes), (0, 0, 0))
        same(info.open_fds, len(os.listdir(f"/proc/{daemon.pid}/fd")))
    with report.check("AdminService is UNIMPLEMENTED on the public socket"):
        stub = admin_grpc.AdminServiceStub(daemon.channel)
        unimplemented = grpc.StatusCode.UNIMPLEMENTED
        try:
            stub.GetInfo(admin.GetInfoRequest(), timeout=10)
        except grpc.RpcError as error:
            same(error.code(), unimplemented)
        else:
            raise AssertionError("it answered")


def domains(report, daemon):
    with report.check("CreateDomain answers the plan, sizes rounded up to the granule"):
        made = daemon.create("d0", bounce_bytes=MIB + 1, coherent_bytes=2 * MIB)
        same((made.name, made.owner_uid), ("domains/d0", os.geteuid()))
        same((made.bounce_bytes, made.coherent_bytes), (MIB + GRANULE, 2 * MIB))
        same((made.bounce.start, made.bounce.last), (0, MIB + GRANULE - 1))
        same((made.coherent.start, made.coherent.last), (MIB + GRANULE, 3 * MIB + GRANULE - 1))
        same((made.granule_bytes, made.iova_limit), (GRANULE, (1 << 48) - 1))
        same((made.backing, made.scrub), (domain.BACKING_MEMFD, domain.SCRUB_ON_MAP))
        # Address 0 is never handed out.
        same(made.max_mapping_bytes, MIB)
        quotas = made.quotas
        same((quotas.sessions, quotas.mappings, quotas.memories, quotas.direct),
             (512, 65536, 1024, 131072))
    with report.check("validate_only answers the plan and makes nothing"):
        spec = domain.DomainSpec(bounce_bytes=MIB, granule_bytes=64 * KIB)
        request = domain.CreateDomainRequest(domain_id="dry", spec=spec, validate_only=True)
        plan = call(daemon.domains.CreateDomain, request)
        same((plan.name, plan.coherent_bytes), ("domains/dry", 64 * MIB))
        refusal(lambda: daemon.get("domains/dry"), MISSING, "NO_SUCH_DOMAIN")
    with report.check("GetDomain shows what CreateDomain answered"):
        same(daemon.get("domains/d0").uid, made.uid)
    with report.check("ListDomains goes through all pages, ordered by name"):
        for number in range(1, 5):
            daemon.create(f"d{number}")
        names, token = [], ""
        while True:
            request = domain.ListDomainsRequest(page_size=2, page_token=token)
            page = call(daemon.domains.ListDomains, request)
            assert len(page.domains) <= 2
            names += [one.name for one in page.domains]
            token = page.next_page_token
            if not token:
                break
        same(names, [f"domains/d{number}" for number in range(5)])
    with report.check("UpdateDomain changes what is set and leaves the rest"):
        request = domain.UpdateDomainRequest(
            name="domains/d0", scrub=domain.SCRUB_ON_UNMAP, quotas=domain.Quotas(mappings=7)
        )
        call(daemon.domains.UpdateDomain, request)
        found = daemon.get("domains/d0")
        same((found.scrub, found.quotas.mappings), (domain.SCRUB_ON_UNMAP, 7))
        same((found.quotas.sessions, found.bounce_bytes), (512, made.bounce_bytes))
    with report.check("DeleteDomain deletes; a new domain of that name is another"):
        same(daemon.delete("domains/d0").ended_sessions, 0)
        refusal(lambda: daemon.get("domains/d0"), MISSING, "NO_SUCH_DOMAIN")
        assert daemon.create("d0").uid != made.uid
    with report.check("allow_missing makes a second delete succeed"):
        for number in range(5):
            daemon.delete(f"domains/d{number}")
        daemon.delete("domains/d0", allow_missing=True)


def domain_refusals(report, daemon):
    """A table: what is asked, and the code, reason and numbers it gets."""
    daemon.create("there", bounce_bytes=MIB, coherent_bytes=0)
    largest = (1 << 64) - 1

    def make(name="fresh", **spec):
        return lambda: daemon.create(name, **spec)

    def ask(method, request):
        return lambda: call(method, request)

    list_domains, update = daemon.domains.ListDomains, daemon.domains.UpdateDomain
    budget = daemon.info().region_budget_bytes
    table = [
        ("a name with a capital", make("Bad"), INVALID, "INVALID_NAME", {}),
        ("a resource name without its collection",
         ask(daemon.domains.GetDomain, domain.GetDomainRequest(name="there")),
         INVALID, "INVALID_NAME", {}),
        ("a page token of somebody else",
         ask(list_domains, domain.ListDomainsRequest(page_token="NOT ONE")),
         INVALID, "MALFORMED", {}),
        ("an unknown granule", make(granule_bytes=8192), INVALID, "MALFORMED", {}),
        ("a base off the granule", make(aperture_base=1), INVALID, "MISALIGNED",
         dict(aperture_base="0x1", granule_bytes=GRANULE)),
        ("an aperture of one granule", make(bounce_bytes=1), INVALID, "APERTURE_TOO_SMALL",
         dict(aperture="bounce", aperture_bytes=GRANULE, granule_bytes=GRANULE)),
        ("an aperture past iova_limit", make(iova_limit=MIB + 1), RANGE, "PAST_IOVA_LIMIT",
         dict(aperture="coherent", iova_limit=hex(MIB + 1))),
        ("an aperture past 2^64",
         make(aperture_base=largest - MIB + 1, iova_limit=largest), RANGE, "ADDRESS_OVERFLOW", {}),
        ("a name in use", make("there"), EXISTS, "DOMAIN_EXISTS", dict(domain="there")),
        ("no such domain", lambda: daemon.get("domains/fresh"), MISSING, "NO_SUCH_DOMAIN", {}),
        ("more than the daemon's budget", make(bounce_bytes=8 * TIB), EXHAUSTED, "NO_MEMORY",
         dict(want_bytes=8 * TIB + MIB, used=MIB, limit=budget)),
        ("no such session",
         ask(daemon.sessions.GetSession, session_pb.GetSessionRequest(name="sessions/4711")),
         MISSING, "NO_SUCH_SESSION", {}),
        ("a session's name that is none",
         ask(daemon.sessions.EvictSession, session_pb.EvictSessionRequest(name="4711")),
         INVALID, "INVALID_NAME", {}),
        ("an update of no domain",
         ask(update, domain.UpdateDomainRequest(name="domains/fresh")),
         MISSING, "NO_SUCH_DOMAIN", {}),
    ]
    for what, work, code, reason, numbers in table:
        with report.check(f"{what}: {code.name} {reason}"):
            daemon.refuses(work, code, reason, **numbers)
    with report.check("after all these refusals the same name is free and whole"):
        daemon.create("fresh")
        daemon.delete("domains/fresh")
    daemon.delete("domains/there")


def deadlines(report, daemon):
    late = grpc.StatusCode.DEADLINE_EXCEEDED
    with report.check("a stream that says nothing more ends at its deadline"):
        begin = time.monotonic()
        watch = health_pb2_grpc.HealthStub(daemon.channel).Watch
        stream = watch(health_pb2.HealthCheckRequest(), timeout=0.2)
        same(next(stream).status, health_pb2.HealthCheckResponse.SERVING)
        try:
            next(stream)
        except grpc.RpcError as error:
            same(error.code(), late)
        else:
            raise AssertionError("it said something")
        assert 0.19 <= time.monotonic() - begin <= 5, "at its deadline"
    with report.check("a create that misses its deadline is done whole or not at all") as check:
        spec = domain.DomainSpec(bounce_bytes=512 * MIB, coherent_bytes=0)
        request = domain.CreateDomainRequest(domain_id="slow", spec=spec)
        try:
            call(daemon.domains.CreateDomain, request, timeout=0.02)
        except Refused as refused:
            # Whichever clock is first, ours or the daemon's.
            same(refused.code.name, late.name)
        else:
            raise AssertionError("it was in time")
        # Whatever was begun comes to its end, and can be deleted like any other.
        eventually("the create has ended", lambda: has_settled(daemon), seconds=30)
        check.note = "it was done" if daemon.info().domains else "it was not done"
        eventually("it is gone", lambda: is_deleted(daemon, "domains/slow"))


def has_settled(daemon):
    """No bytes without their domain."""
    info = daemon.info()
    return (info.domains, info.region_bytes) in [(0, 0), (1, 512 * MIB)]


def is_deleted(daemon, name):
    # Again and again: a late request may only now be served.
    daemon.delete(name, allow_missing=True)
    info = daemon.info()
    return (info.domains, info.region_bytes) == (0, 0)


def driver_and_device(report, daemon):
    with ExitStack() as stack:
        name = stack.enter_context(a_domain(daemon))
        with report.check("a driver attaches in Python and maps the regions it is given"):
            driver = Driver(daemon, name)
            stack.callback(driver.close)
            session = driver.session
            same(session.welcome.version, 1)
            same([one.kind for one in session.apertures],
                 [fd.REGION_KIND_BOUNCE, fd.REGION_KIND_COHERENT])
            same([(one.start, one.last) for one in session.apertures],
                 [(0, MIB - 1), (MIB, 2 * MIB - 1)])
        with report.check("regions have mode 0600, their pages, and seals against resizing"):
            sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            for one in session.apertures:
                same(one.mapping.stat.st_mode & 0o777, 0o600)
                assert one.mapping.stat.st_blocks * 512 >= MIB and one.mapping.seals & sealed == sealed
        with report.check("a device attaches in another process"):
            device = Device(daemon, name)
            stack.callback(device.process.kill)
            same(device.welcome["apertures"], 2)
        with report.check("sessions are listed with the peers that the kernel names"):
            listed = call(daemon.sessions.ListSessions, session_pb.ListSessionsRequest(domain=name))
            same([(one.name, one.role, one.peer.pid) for one in listed.sessions],
                 [(session.name, types.ROLE_DRIVER, os.getpid()),
                  (device.welcome["session"], types.ROLE_DEVICE, device.process.pid)])
        with report.check("a sealed memfd is registered"):
            buffer = Buffer(4 * GRANULE)
            stack.callback(buffer.close)
            registered = session.register(buffer.memfd)
            same(registered.size_bytes, 4 * GRANULE)
            memory = registered.memory_id

        text = b"from the driver"
        buffer.memory[100 : 100 + len(text)] = text
        with report.check("Map BIDIRECTIONAL shows the driver's bytes at the iova, to both"):
            mapped = driver.map_one(
                memory_id=memory, offset=100, len_bytes=len(text),
                direction=types.DIRECTION_BIDIRECTIONAL, keep_offset=True,
            )
            same((mapped.iova % GRANULE, mapped.len_bytes), (100, len(text)))
            same(session.read(mapped.iova, len(text)), text)
            same(device.read(mapped.iova, len(text)), text)
        with report.check("the rest of the granule reads zero"):
            start = mapped.iova - 100
            same(session.read(start, 100), bytes(100))
            behind = mapped.iova + len(text)
            same(session.read(behind, start + GRANULE - behind), bytes(start + GRANULE - behind))
        with report.check("what the device writes is not in the driver's buffer before Unmap"):
            device.write(mapped.iova, b"FROM THE DEVICE")
            same(buffer.memory[100:115], text)
        with report.check("Sync FOR_CPU brings a part of it"):
            driver.sync(mapped, offset=0, len_bytes=4, target=mapping.SYNC_TARGET_FOR_CPU)
            same(buffer.memory[100:115], b"FROM the driver")
        with report.check("Sync FOR_DEVICE takes a part there"):
            buffer.memory[100:104] = b"with"
            driver.sync(mapped, offset=0, len_bytes=4, target=mapping.SYNC_TARGET_FOR_DEVICE)
            same(device.read(mapped.iova, 15), b"with THE DEVICE")
        with report.check("ListMappings shows it, with its owner and its memory"):
            request = mapping.ListMappingsRequest(domain=name)
            listed = call(daemon.mappings.ListMappings, request).mappings
            same([(one.iova, one.len_bytes, one.session, one.memory_id, one.offset) for one in listed],
                 [(mapped.iova, 15, session.name, memory, 100)])
            same((listed[0].state, listed[0].perm),
                 (mapping.MAPPING_STATE_LIVE, types.PERM_READ_WRITE))
        with report.check("Unmap copies back exactly the buffer's bytes"):
            same(driver.unmap_one(mapped), 15)
            same(buffer.memory[:], bytes(100) + b"with THE DEVICE" + bytes(4 * GRANULE - 115))
        with report.check("a second Unmap is NOT_FOUND"):
            daemon.refuses(lambda: driver.unmap_one(mapped), MISSING, "NO_SUCH_MAPPING",
                           iova=hex(mapped.iova), mapping_id=mapped.mapping_id)

        buffer.memory[:GRANULE] = b"s" * GRANULE
        with report.check("Map FROM_DEVICE hides what the buffer held, and written_bytes flow back"):
            mapped = driver.map_one(memory_id=memory, offset=0, len_bytes=GRANULE,
                                    direction=types.DIRECTION_FROM_DEVICE)
            same(device.read(mapped.iova, GRANULE), bytes(GRANULE))
            device.write(mapped.iova, b"x" * 100)
            same(driver.unmap_one(mapped, written_bytes=7), 7)
            same(buffer.memory[:GRANULE], b"x" * 7 + b"s" * (GRANULE - 7))
        with report.check("Map TO_DEVICE copies in and nothing back"):
            mapped = driver.map_one(memory_id=memory, offset=0, len_bytes=GRANULE,
                                    direction=types.DIRECTION_TO_DEVICE)
            device.write(mapped.iova, b"y" * GRANULE)
            same(driver.unmap_one(mapped), 0)
            same(buffer.memory[:8], b"xxxxxxxs")

        with report.check("coherent memory is zeroed and seen by both sides at once"):
            ring = driver.alloc(len_bytes=100)
            assert ring.iova and ring.iova % GRANULE == 0
            same(device.read(ring.iova, 100), bytes(100))
            session.write(ring.iova, b"doorbell")
            same(device.read(ring.iova, 8), b"doorbell")
            device.write(ring.iova, b"answered")
            same(session.read(ring.iova, 8), b"answered")
        with report.check("FreeCoherent zeroes and frees it"):
            driver.free(ring.iova, ring.mapping_id)
            same(session.read(ring.iova, 8), bytes(8))
            same(daemon.get(name).usage.coherent_used_bytes, 0)

        with report.check("a device may not allocate: PERMISSION_DENIED WRONG_ROLE"):
            same(device.ask("alloc"), {"code": "PERMISSION_DENIED", "reason": "WRONG_ROLE"})
            daemon.shown.add("WRONG_ROLE")
        with report.check("the driver's token from another process: PERMISSION_DENIED WRONG_PEER"):
            token = session.attached.token.hex()
            same(device.ask("alloc", token=token),
                 {"code": "PERMISSION_DENIED", "reason": "WRONG_PEER"})
            daemon.shown.add("WRONG_PEER")
        with report.check("a device that detaches is gone from the list"):
            device.ask("detach")
            same(device.end(), 0)
            eventually("one session", lambda: daemon.get(name).usage.sessions == 1)


def mapping_refusals(report, daemon):
    with ExitStack() as stack:
        name = stack.enter_context(a_domain(daemon, coherent_bytes=0))
        driver, other = Driver(daemon, name), Driver(daemon, name)
        buffer = Buffer(2 * MIB)
        for one in driver, other, buffer:
            stack.callback(one.close)
        memory = driver.session.register(buffer.memfd).memory_id
        readable = driver.session.register(buffer.memfd, writable=False).memory_id
        both = types.DIRECTION_BIDIRECTIONAL
        good = dict(memory_id=memory, offset=0, len_bytes=100, direction=both)
        there = driver.map_one(**{**good, "direction": types.DIRECTION_TO_DEVICE})
        named = dict(iova=there.iova, mapping_id=there.mapping_id)
        one_way = dict(offset=0, len_bytes=1, target=mapping.SYNC_TARGET_FOR_CPU)

        def maps(**entry):
            return lambda: driver.map({**good, **entry})

        def bare(metadata):
            request = mapping.MapRequest(entries=[mapping.MapEntry(**good)])
            return lambda: call(daemon.mappings.Map, request, metadata=metadata)

        table = [
            ("no token", bare(()), DENIED, "NO_SESSION", {}),
            ("a token that is none", bare((("domaind-session", "xyz"),)), INVALID, "MALFORMED", {}),
            ("a token of no session", bare((("domaind-session", "0" * 48),)),
             MISSING, "NO_SUCH_SESSION", {}),
            ("a length of zero", maps(len_bytes=0), INVALID, "ZERO_LENGTH", {}),
            ("no direction", maps(direction=0), INVALID, "UNKNOWN_DIRECTION", dict(entry_index=0)),
            ("an unknown direction", maps(direction=9), INVALID, "UNKNOWN_DIRECTION", {}),
            ("an alignment of three", maps(align_bytes=3), INVALID, "MISALIGNED", dict(align_bytes=3)),
            ("past the memory's end", maps(offset=2 * MIB - 50), INVALID, "OUTSIDE_MEMORY",
             dict(offset=2 * MIB - 50, len_bytes=100, size_bytes=2 * MIB)),
            ("an offset near 2^64", maps(offset=(1 << 64) - 1), RANGE, "ADDRESS_OVERFLOW", {}),
            ("no such memory", maps(memory_id=99), MISSING, "NO_SUCH_MEMORY", dict(memory_id=99)),
            ("memory of another session", lambda: other.map(good), DENIED, "NOT_YOURS",
             dict(memory_id=memory)),
            ("writing back to read-only memory", maps(memory_id=readable), DENIED, "READ_ONLY",
             dict(memory_id=readable)),
            ("longer than any hole", maps(len_bytes=MIB), EXHAUSTED, "NO_SPACE",
             dict(want_bytes=MIB, largest_hole_bytes=MIB - 2 * GRANULE)),
            ("an upper limit below all holes", maps(limit=GRANULE), EXHAUSTED, "NO_SPACE", {}),
            ("no entries", lambda: driver.map(), INVALID, "MALFORMED", {}),
            ("1025 entries", lambda: driver.map(*[good] * 1025), INVALID, "MALFORMED", {}),
            ("the second of two entries",
             lambda: driver.map(good, {**good, "len_bytes": 0}),
             INVALID, "ZERO_LENGTH", dict(entry_index=1)),
            ("coherent memory without an aperture", lambda: driver.alloc(len_bytes=1),
             INVALID, "NO_APERTURE", {}),
            ("a stale id", lambda: driver.unmap({**named, "mapping_id": 999}),
             MISSING, "NO_SUCH_MAPPING", dict(iova=hex(there.iova), mapping_id=999)),
            ("an address inside a mapping", lambda: driver.unmap({**named, "iova": there.iova + 1}),
             MISSING, "NO_SUCH_MAPPING", {}),
            ("another session's mapping", lambda: other.unmap(named), DENIED, "NOT_YOURS",
             dict(iova=hex(there.iova), mapping_id=there.mapping_id)),
            ("the same mapping twice in one request", lambda: driver.unmap(named, named),
             INVALID, "DUPLICATE_ENTRY", dict(mapping_id=there.mapping_id, entry_index=1)),
            ("written_bytes where nothing flows back",
             lambda: driver.unmap({**named, "written_bytes": 1}), INVALID, "WRITTEN_BYTES", {}),
            ("Sync against the direction", lambda: driver.sync(there, **one_way),
             INVALID, "WRONG_DIRECTION", {}),
            ("Sync past the mapping",
             lambda: driver.sync(there, offset=99, len_bytes=2,
                                 target=mapping.SYNC_TARGET_FOR_DEVICE),
             INVALID, "OUTSIDE_MAPPING", dict(offset=99, len_bytes=2, mapping_bytes=100)),
            ("a domain that is in use", lambda: daemon.delete(name), STATE, "DOMAIN_IN_USE",
             dict(sessions=2, streaming_mappings=1, coherent_allocations=0, memories=2)),
            ("unregistering memory that is mapped", lambda: driver.session.unregister(memory),
             STATE, "MEMORY_IN_USE", dict(memory_id=memory, mappings=1)),
        ]
        for what, work, code, reason, numbers in table:
            with report.check(f"{what}: {code.name} {reason}"):
                daemon.refuses(work, code, reason, **numbers)
        with report.check("none of these refusals has changed anything"):
            usage = daemon.get(name).usage
            same((usage.streaming_mappings, usage.memories, usage.bounce_used_bytes),
                 (1, 2, GRANULE))
            driver.unmap_one(there)

        with report.check("a partial batch answers entry by entry"):
            answers = driver.map(good, {**good, "len_bytes": 0}, good, partial=True).results
            same([one.WhichOneof("outcome") for one in answers], ["mapping", "refusal", "mapping"])
            same((answers[1].refusal.code, answers[1].refusal.reason),
                 (INVALID, types.ERROR_REASON_ZERO_LENGTH))
            first, last = answers[0].mapping, answers[2].mapping
            freed = driver.unmap(
                dict(iova=first.iova, mapping_id=first.mapping_id),
                dict(iova=last.iova, mapping_id=999), partial=True,
            ).results
            same([one.HasField("refusal") for one in freed], [False, True])
            driver.unmap_one(last)
        with report.check("FROM_DEVICE needs written_bytes, no more than its length"):
            mapped = driver.map_one(**{**good, "direction": types.DIRECTION_FROM_DEVICE})
            daemon.refuses(lambda: driver.unmap_one(mapped), INVALID, "WRITTEN_BYTES", len_bytes=100)
            daemon.refuses(lambda: driver.unmap_one(mapped, written_bytes=101), INVALID,
                           "WRITTEN_BYTES", written_bytes=101, len_bytes=100)
            driver.unmap_one(mapped, written_bytes=0)
        with report.check("a quota names itself, its limit and its use"):
            mapped = driver.map_one(**good)
            quota = domain.UpdateDomainRequest(name=name, quotas=domain.Quotas(mappings=1))
            call(daemon.domains.UpdateDomain, quota)
            daemon.refuses(lambda: driver.map(good), EXHAUSTED, "QUOTA_EXCEEDED",
                           quota="mappings", limit=1, used=1)
            driver.unmap_one(mapped)
        with report.check("a quota below what is in use: FAILED_PRECONDITION QUOTA_EXCEEDED"):
            quota = domain.UpdateDomainRequest(name=name, quotas=domain.Quotas(sessions=1))
            daemon.refuses(lambda: call(daemon.domains.UpdateDomain, quota), STATE,
                           "QUOTA_EXCEEDED", quota="sessions", limit=1, used=2)
        with report.check("a file that refuses the bytes keeps the mapping: COPY_FAILED"):
            closing = Buffer(GRANULE, seals=fcntl.F_SEAL_SHRINK)
            memory = driver.session.register(closing.memfd).memory_id
            mapped = driver.map_one(**{**good, "memory_id": memory})
            # Sealed only now: the kernel refuses while the file is mapped writable.
            closing.memory.close()
            fcntl.fcntl(closing.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            daemon.refuses(lambda: driver.unmap_one(mapped), STATE, "COPY_FAILED",
                           memory_id=memory, offset=0, len_bytes=100)
            same(daemon.get(name).usage.streaming_mappings, 1)
            driver.unmap_one(mapped, skip_sync=True)
            driver.session.unregister(memory)
            os.close(closing.memfd)


def fd_socket_refusals(report, daemon):
    with ExitStack() as stack:
        name = stack.enter_context(a_domain(daemon))
        driver = Driver(daemon, name)
        stack.callback(driver.close)
        session = driver.session

        with report.check("memory that could shrink: INVALID_ARGUMENT MEMORY_REFUSED"):
            loose = Buffer(GRANULE, seals=0)
            daemon.refuses(lambda: session.register(loose.memfd), INVALID, "MEMORY_REFUSED")
            loose.close()
        with report.check("a pipe is no memory: INVALID_ARGUMENT MEMORY_REFUSED"):
            reader, writer = os.pipe()
            daemon.refuses(lambda: session.register(reader), INVALID, "MEMORY_REFUSED")
            os.close(reader)
            os.close(writer)
        with report.check("a second Attach: FAILED_PRECONDITION OUT_OF_TURN"):
            again = dict(domain=name, role=types.ROLE_DRIVER, access=types.ACCESS_READ_WRITE)
            daemon.refuses(lambda: session.attach(**again), STATE, "OUT_OF_TURN")
        with report.check("the session goes on after all of these"):
            same(daemon.get(name).usage.sessions, 1)
            buffer = Buffer(GRANULE)
            session.unregister(session.register(buffer.memfd).memory_id)
            buffer.close()

        with report.check("a refused Attach may be corrected on the same connection"):
            with closing(Connection(daemon.dir)) as connection:
                connection.hello()
                for wrong, code, reason in [
                    (dict(domain="domains/none"), MISSING, "NO_SUCH_DOMAIN"),
                    (dict(domain="none"), INVALID, "INVALID_NAME"),
                    (dict(role=types.ROLE_UNSPECIFIED), INVALID, "MALFORMED"),
                    # We have the daemon's uid, and could open the grant again.
                    (dict(access=types.ACCESS_READ_ONLY), DENIED, "UNENFORCEABLE"),
                ]:
                    body = fd.Attach(**{**again, **wrong})
                    connection.send(attach=body)
                    daemon.refuses(lambda: connection.answer("attached"), code, reason)
                connection.send(attach=fd.Attach(**again))
                connection.answer("attached")

        broken = [
            ("Attach before Hello", dict(attach=fd.Attach(**again))),
            ("a version nobody speaks", dict(hello=fd.Hello(min_version=7, max_version=9))),
            ("a frame without a body", dict()),
        ]
        for what, body in broken:
            with report.check(f"{what} ends the connection: PROTOCOL"):
                with closing(Connection(daemon.dir)) as connection:
                    connection.send(**body)
                    ended_with(connection, fd.END_REASON_PROTOCOL)
        attached = [
            ("an fd with a frame that takes none", dict(unregister_memory=fd.UnregisterMemory()), 1),
            ("two fds", dict(register_memory=fd.RegisterMemory()), 2),
        ]
        for what, body, fds in attached:
            with report.check(f"{what} ends the connection: PROTOCOL"):
                with closing(Session(daemon.dir, name, types.ROLE_DRIVER)) as session:
                    session.send(fds=[0] * fds, **body)
                    ended_with(session, fd.END_REASON_PROTOCOL)
        if daemon.info().features.pass_rights_off:
            with report.check("an fd before Attach is not even delivered"):
                with closing(Connection(daemon.dir)) as connection:
                    try:
                        connection.send(fds=[0], hello=fd.Hello(min_version=1, max_version=1))
                    except PermissionError:
                        pass
                    else:
                        raise AssertionError("it was sent")
        with report.check("what is no frame ends the connection: PROTOCOL"):
            with closing(Connection(daemon.dir)) as connection:
                connection.socket.send(b"\xff" * 16)
                ended_with(connection, fd.END_REASON_PROTOCOL)
        eventually("only the driver is left", lambda: daemon.get(name).usage.sessions == 1)


@contextmanager
def closing(connection):
    try:
        yield connection
    finally:
        connection.close()


def ended_with(connection, reason):
    """The service says why, and closes."""
    try:
        connection.answer("nothing")
    except SessionEnded as ended:
        same(fd.EndReason.Name(ended.reason), fd.EndReason.Name(reason))
    same(connection.receive()[0], None)


def ends(report, daemon):
    with report.check("an evicted session is told, and its token is worth nothing"):
        with a_domain(daemon) as name:
            driver = Driver(daemon, name)
            request = session_pb.EvictSessionRequest(name=driver.session.name)
            call(daemon.sessions.EvictSession, request)
            ended_with(driver.session, fd.END_REASON_EVICTED)
            daemon.refuses(lambda: driver.alloc(len_bytes=1), MISSING, "NO_SUCH_SESSION")
            driver.close()
    with report.check("deleting a domain by force tells its sessions and counts them"):
        daemon.create("d0")
        driver = Driver(daemon, "domains/d0")
        driver.alloc(len_bytes=1)
        same(daemon.delete("domains/d0", force=True).ended_sessions, 1)
        ended_with(driver.session, fd.END_REASON_DOMAIN_DELETED)
        # What it has mapped stays readable.
        same(driver.session.read(MIB, 8), bytes(8))
        driver.close()
    with report.check("a device killed with SIGKILL leaves no session behind"):
        with a_domain(daemon) as name:
            device = Device(daemon, name)
            same(daemon.get(name).usage.sessions, 1)
            device.process.kill()
            device.process.wait()
            device.process.stdin.close()
            device.process.stdout.close()
            eventually("no session", lambda: daemon.get(name).usage.sessions == 0)


def every_reason(report, daemon):
    with report.check("every reason was shown, or is known not to be reachable") as check:
        known = {one.removeprefix("ERROR_REASON_") for one in types.ErrorReason.keys()}
        same(sorted(known - daemon.shown), sorted(NOT_SHOWN))
        check.note = f"{len(daemon.shown)} shown, {len(NOT_SHOWN)} not reachable"


def nothing_left(report, daemon, before):
    with report.check("at the end the daemon holds what it held at the beginning"):
        def held(info):
            return (info.domains, info.sessions, info.streaming_mappings, info.direct_mappings,
                    info.coherent_allocations, info.memories, info.region_bytes)

        eventually("nothing is held", lambda: held(daemon.info()) == held(before))
        # The public channel was not connected yet when it was counted before.
        eventually("no fd is left", lambda: daemon.info().open_fds <= before.open_fds + FDS_OF_A_CONNECTION)


# Its socket, and the pidfd of its peer.
FDS_OF_A_CONNECTION = 2


def stop(report, daemon):
    with report.check("SIGTERM: sessions are told, the sockets go, the daemon ends"):
        daemon.create("d0")
        driver = Driver(daemon, "domains/d0")
        watch = health_pb2_grpc.HealthStub(daemon.channel).Watch
        health = watch(health_pb2.HealthCheckRequest(), timeout=30)
        same(next(health).status, health_pb2.HealthCheckResponse.SERVING)
        os.kill(daemon.pid, signal.SIGTERM)
        begin = time.monotonic()
        ended_with(driver.session, fd.END_REASON_SHUTDOWN)
        driver.close()
        # A watcher is told, and does not keep the daemon from ending.
        same(next(health).status, health_pb2.HealthCheckResponse.NOT_SERVING)
        same(list(health), [])
        daemon.close()
        eventually("no socket", lambda: not os.path.exists(socket_path(daemon.dir, PUBLIC)))
        assert time.monotonic() - begin < 5, "not the ten seconds that calls are given"


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1], int(sys.argv[2])) else 1)
