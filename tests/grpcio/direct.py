"""Direct mappings, tables, translation, reset, and requests that are repeated."""

from contextlib import ExitStack

from domaind.v1 import domain_pb2 as domain
from domaind.v1 import mapping_pb2 as mapping
from domaind.v1 import session_pb2 as session_pb
from domaind.v1 import types_pb2 as types

from clients import (
    DENIED, EXHAUSTED, EXISTS, GRANULE, INVALID, MIB, MISSING, RANGE, STALE, STATE,
    Driver, a_domain, wire_ranges,
)
from domaind_client.api import call, wire_range
from domaind_client.memory import Buffer
from harness import eventually, same

READ, WRITE, BOTH = types.PERM_READ, types.PERM_WRITE, types.PERM_READ_WRITE
DIRECT = mapping.MAPPING_KIND_DIRECT
# Above the apertures of a_domain(), which are 1 MiB each.
PLACE = 16 * MIB


def entry(memory, iova, granules=1, offset=0, perm=BOTH):
    """One entry of a table."""
    there = wire_range(iova, iova + granules * GRANULE - 1)
    return mapping.DirectMapping(range=there, memory_id=memory, offset=offset, perm=perm)


def piece(memory, **rest):
    """One piece to enter: a granule at PLACE, if nothing else is said."""
    if "align_bytes" not in rest and "limit" not in rest:
        rest.setdefault("iova", PLACE)
    return {"memory_id": memory, "offset": 0, "len_bytes": GRANULE, "perm": BOTH, **rest}


def shown(pieces):
    return [(one.range.start, one.range.last, one.kind, one.memory_id, one.offset, one.perm)
            for one in pieces]


def spans(mappings):
    return [(one.iova, one.len_bytes) for one in mappings]


def direct_mappings(report, daemon):
    with ExitStack() as stack:
        name = stack.enter_context(a_domain(daemon))
        driver = Driver(daemon, name)
        buffer = Buffer(MIB)
        for one in driver, buffer:
            stack.callback(one.close)
        memory = driver.session.register(buffer.memfd).memory_id

        def listed(**request):
            request = mapping.ListMappingsRequest(domain=name, **request)
            return call(daemon.mappings.ListMappings, request).mappings

        with report.check("MapDirect enters memory where it is told, and where there is room"):
            fixed = piece(memory, len_bytes=2 * GRANULE, offset=GRANULE, perm=READ)
            anywhere = piece(memory, align_bytes=64 * GRANULE)
            answers = driver.map_direct(fixed, anywhere).results
            first, second = [one.mapping for one in answers]
            same((first.range.start, first.range.last), (PLACE, PLACE + 2 * GRANULE - 1))
            same((first.memory_id, first.offset, first.perm), (memory, GRANULE, READ))
            assert second.range.start % (64 * GRANULE) == 0
            # The lowest place: the first behind the apertures.
            same(second.range.start, 2 * MIB)
        with report.check("Translate answers pieces of exactly what was asked"):
            answer = driver.translate(PLACE + 5, PLACE + GRANULE)
            same(shown(answer.pieces),
                 [(PLACE + 5, PLACE + GRANULE, DIRECT, memory, GRANULE + 5, READ)])
            same(answer.generation, daemon.get(name).generation)
        with report.check("Translate goes across neighbours, and through a coherent allocation"):
            driver.map_direct(piece(memory, iova=PLACE + 2 * GRANULE, perm=BOTH))
            answer = driver.translate(PLACE + GRANULE, PLACE + 3 * GRANULE - 1)
            same([one[:2] for one in shown(answer.pieces)],
                 [(PLACE + GRANULE, PLACE + 2 * GRANULE - 1),
                  (PLACE + 2 * GRANULE, PLACE + 3 * GRANULE - 1)])
            ring = driver.alloc(len_bytes=100)
            answer = driver.translate(ring.iova, ring.iova + 99, want=BOTH)
            same([(one.kind, one.offset) for one in answer.pieces],
                 [(mapping.MAPPING_KIND_COHERENT, ring.iova - MIB)])
        with report.check("Lookup answers the lowest mapping, whole"):
            found = driver.lookup(PLACE + GRANULE, PLACE + MIB)
            same((found.kind, found.iova, found.len_bytes), (DIRECT, PLACE, 2 * GRANULE))
            same((found.session, found.memory_id), (driver.session.name, memory))
        with report.check("the owner asks the same without a session"):
            request = mapping.TranslateRequest(
                domain=name, range=wire_range(PLACE, PLACE), want=READ)
            same(shown(call(daemon.mappings.Translate, request).pieces),
                 [(PLACE, PLACE, DIRECT, memory, GRANULE, READ)])
        with report.check("ListMappings asks by kind, by memory, by byte and by range"):
            same(spans(listed(kind=DIRECT)),
                 [(2 * MIB, GRANULE), (PLACE, 2 * GRANULE), (PLACE + 2 * GRANULE, GRANULE)])
            same(spans(listed(memory_id=memory, memory_offset=5)),
                 [(2 * MIB, GRANULE), (PLACE + 2 * GRANULE, GRANULE)])
            same(spans(listed(range=wire_range(0, 2 * MIB))),
                 [(ring.iova, 100), (2 * MIB, GRANULE)])
        with report.check("ListMemories and GetDomain count direct mappings"):
            request = session_pb.ListMemoriesRequest(domain=name)
            same([one.direct_mappings for one in
                  call(daemon.sessions.ListMemories, request).memories], [3])
            usage = daemon.get(name).usage
            same((usage.direct_mappings, daemon.info().direct_mappings), (3, 3))
        with report.check("memory that is mapped directly cannot be unregistered"):
            daemon.refuses(lambda: driver.session.unregister(memory), STATE, "MEMORY_IN_USE",
                           memory_id=memory, mappings=0, direct_mappings=3)
        with report.check("UnmapDirect removes what lies inside, ClearMap what overlaps"):
            answer = driver.unmap_direct((PLACE, PLACE + 3 * GRANULE - 1))
            same((answer.unmapped_mappings, answer.unmapped_bytes), (2, 3 * GRANULE))
            answer = driver.clear_map((2 * MIB + 5, 2 * MIB + 5), (PLACE, PLACE))
            same((answer.removed_mappings, answer.removed_bytes), (1, GRANULE))
            same(daemon.get(name).usage.direct_mappings, 0)
        with report.check("unmapping everything of nothing succeeds"):
            same(driver.unmap_direct((0, (1 << 64) - 1)).unmapped_mappings, 0)

        with report.check("persistent memory and its mappings stay when the session ends"):
            other = Driver(daemon, name)
            kept = other.session.register(buffer.memfd, persistent=True).memory_id
            own = other.session.register(buffer.memfd).memory_id
            other.map_direct(piece(kept), piece(own, iova=PLACE + MIB))
            other.session.detach()
            eventually("one session", lambda: daemon.get(name).usage.sessions == 1)
            there = listed(kind=DIRECT)
            same([(one.iova, one.session, one.persistent) for one in there], [(PLACE, "", True)])
            # Any driver may end it, and give the memory back.
            driver.clear_map((PLACE, PLACE))
            driver.session.unregister(kept)

        with report.check("ResetBounce takes the aperture back, and only with force what is mapped"):
            buffer.memory[:6] = b"secret"
            bounced = driver.map_one(memory_id=memory, offset=0, len_bytes=6,
                                     direction=types.DIRECTION_BIDIRECTIONAL)
            driver.map_direct(piece(memory))
            daemon.refuses(driver.reset, STATE, "BOUNCE_IN_USE", streaming_mappings=1)
            same(driver.session.read(bounced.iova, 6), b"secret")
            same(driver.reset(force=True).ended_mappings, 1)
            same(driver.session.read(bounced.iova, 6), bytes(6))
            usage = daemon.get(name).usage
            same((usage.streaming_mappings, usage.bounce_used_bytes), (0, 0))
            same((usage.direct_mappings, usage.coherent_allocations), (1, 1))
            daemon.refuses(lambda: driver.unmap_one(bounced), MISSING, "NO_SUCH_MAPPING")

    with report.check("reserved and allowed ranges are planned, shown, replaced and lifted"):
        first, second = (PLACE, PLACE + MIB - 1), (PLACE + 2 * MIB, PLACE + 3 * MIB - 1)
        limit = (1 << 48) - 1
        spec = dict(reserved=wire_ranges([first]), allowed=wire_ranges([second]))
        with a_domain(daemon, **spec) as name:
            made = daemon.get(name)
            same([(one.start, one.last) for one in made.direct_ranges],
                 [(2 * MIB, PLACE - 1), (PLACE + MIB, limit)])
            driver = Driver(daemon, name)
            buffer = Buffer(MIB)
            memory = driver.session.register(buffer.memfd).memory_id
            placed = driver.map_direct(piece(memory, align_bytes=0)).results[0].mapping
            same(placed.range.start, second[0])
            daemon.refuses(lambda: driver.map_direct(piece(memory)), INVALID, "RESERVED_RANGE",
                           reserved_start=hex(first[0]), reserved_last=hex(first[1]))
            update = domain.UpdateDomainRequest(
                name=name, reserved=domain.IovaRangeList(ranges=wire_ranges([second])))
            daemon.refuses(lambda: call(daemon.domains.UpdateDomain, update), EXISTS, "OVERLAP",
                           hit_start=hex(second[0]))
            update = domain.UpdateDomainRequest(
                name=name, reserved=domain.IovaRangeList(), allowed=domain.IovaRangeList())
            found = call(daemon.domains.UpdateDomain, update)
            same((list(found.reserved), list(found.allowed)), ([], []))
            driver.map_direct(piece(memory))
            driver.close()
            buffer.close()
    with report.check("validate_only checks the lists, too"):
        def plan(**lists):
            spec = domain.DomainSpec(bounce_bytes=MIB, coherent_bytes=0, **lists)
            request = domain.CreateDomainRequest(domain_id="dry", spec=spec, validate_only=True)
            return call(daemon.domains.CreateDomain, request)

        planned = plan(reserved=wire_ranges([first]))
        same([(one.start, one.last) for one in planned.direct_ranges],
             [(MIB, PLACE - 1), (PLACE + MIB, limit)])
        daemon.refuses(lambda: plan(reserved=wire_ranges([(0, 0)])), EXISTS, "OVERLAP",
                       hit_start="0x0", hit_last=hex(MIB - 1))
        daemon.refuses(lambda: plan(allowed=wire_ranges([(5, 5)])), INVALID, "INVALID_RANGE",
                       range_start="0x5")
        daemon.refuses(lambda: plan(reserved=wire_ranges([first, (9, 8)])), INVALID,
                       "INVALID_RANGE", field="reserved", entry_index=1)


def direct_refusals(report, daemon):
    with ExitStack() as stack:
        name = stack.enter_context(a_domain(daemon, quotas=domain.Quotas(direct=4)))
        daemon.create("elsewhere")
        stack.callback(daemon.delete, "domains/elsewhere", force=True)
        driver, other = Driver(daemon, name), Driver(daemon, name)
        buffer = Buffer(MIB)
        for one in driver, other, buffer:
            stack.callback(one.close)
        memory = driver.session.register(buffer.memfd).memory_id
        readable = driver.session.register(buffer.memfd, writable=False).memory_id
        driver.map_direct(piece(memory, len_bytes=4 * GRANULE, perm=READ))
        last = PLACE + 4 * GRANULE - 1
        free = PLACE + MIB
        limit = (1 << 48) - 1

        def maps(*pieces, **rest):
            pieces = pieces or (piece(memory, **{"iova": free, **rest}),)
            return lambda: driver.map_direct(*pieces)

        def placed(**rest):
            wanted = piece(memory, align_bytes=0, **rest)
            return lambda: driver.map_direct(wanted)

        def ask(do, *arguments, **rest):
            return lambda: do(*arguments, **rest)

        def owner(method, **request):
            return lambda: call(getattr(daemon.mappings, method), request_of(method, **request))

        two = piece(memory, iova=free), piece(memory, iova=free)
        table = [
            ("a length of zero", maps(len_bytes=0), INVALID, "ZERO_LENGTH", dict(entry_index=0)),
            ("an iova off the granule", maps(iova=free + 1), INVALID, "MISALIGNED",
             dict(field="iova", value=hex(free + 1), granule_bytes=GRANULE)),
            ("an offset off the granule", maps(offset=1), INVALID, "MISALIGNED", dict(field="offset")),
            ("a length off the granule", maps(len_bytes=GRANULE + 1), INVALID, "MISALIGNED",
             dict(field="len_bytes")),
            ("no permission", maps(perm=0), INVALID, "UNKNOWN_PERM", dict(entry_index=0, value=0)),
            ("an unknown permission", maps(perm=9), INVALID, "UNKNOWN_PERM", dict(value=9)),
            ("past the memory's end", maps(offset=MIB), INVALID, "OUTSIDE_MEMORY",
             dict(offset=MIB, len_bytes=GRANULE, size_bytes=MIB)),
            ("a length of 2^63", maps(len_bytes=1 << 63), RANGE, "ADDRESS_OVERFLOW",
             dict(len_bytes=1 << 63)),
            ("past 2^64", maps(iova=(1 << 64) - GRANULE, len_bytes=2 * GRANULE), RANGE,
             "ADDRESS_OVERFLOW", {}),
            ("past iova_limit", maps(iova=limit + 1), RANGE, "PAST_IOVA_LIMIT",
             dict(iova_limit=hex(limit))),
            ("over what is mapped", maps(iova=PLACE), EXISTS, "OVERLAP",
             dict(hit_start=hex(PLACE), hit_last=hex(last))),
            ("over an aperture", maps(iova=MIB), EXISTS, "OVERLAP",
             dict(hit_start="0x0", hit_last=hex(2 * MIB - 1))),
            ("two entries in one place", maps(*two), INVALID, "OVERLAPPING_ENTRIES",
             dict(entry_index=1, other_index=0)),
            ("no such memory", maps(memory_id=99), MISSING, "NO_SUCH_MEMORY", dict(memory_id=99)),
            ("another session's memory", lambda: other.map_direct(piece(memory, iova=free)),
             DENIED, "NOT_YOURS", dict(memory_id=memory)),
            ("write permission on read-only memory", maps(memory_id=readable), DENIED, "READ_ONLY",
             dict(memory_id=readable)),
            ("an upper limit below all room", placed(limit=MIB), EXHAUSTED, "NO_SPACE",
             dict(want_bytes=GRANULE)),
            ("an alignment of three", lambda: driver.map_direct(piece(memory, align_bytes=3)),
             INVALID, "MISALIGNED", dict(align_bytes=3)),
            ("more than the quota",
             maps(*[piece(memory, iova=free + n * GRANULE) for n in range(4)]),
             EXHAUSTED, "QUOTA_EXCEEDED", dict(quota="direct", limit=4, used=4)),
            ("no pieces", lambda: driver.map_direct(), INVALID, "MALFORMED", {}),
            ("1025 ranges", ask(driver.clear_map, *[(0, 0)] * 1025), INVALID, "MALFORMED",
             dict(entries=1025)),
            ("a range that cuts", ask(driver.unmap_direct, (PLACE, PLACE + GRANULE - 1)),
             MISSING, "CUTS_MAPPING", dict(cut_start=hex(PLACE), cut_last=hex(last))),
            ("a range with nothing in it", ask(driver.unmap_direct, (free, free)),
             MISSING, "NOT_MAPPED", dict(range_start=hex(free))),
            ("ranges of one request that overlap",
             ask(driver.unmap_direct, (PLACE, last), (last, last)), INVALID,
             "OVERLAPPING_ENTRIES", {}),
            ("a range that ends below its start", ask(driver.unmap_direct, (5, 4)), INVALID,
             "INVALID_RANGE", dict(field="ranges", entry_index=0, start="0x5", last="0x4")),
            ("another session's mapping", ask(other.unmap_direct, (PLACE, last)), DENIED,
             "NOT_YOURS", dict(mapping_start=hex(PLACE))),
            ("clearing another session's mapping", ask(other.clear_map, (PLACE, PLACE)), DENIED,
             "NOT_YOURS", {}),
            ("a table while another session has a mapping", ask(other.set_map), DENIED,
             "NOT_YOURS", {}),
            ("an entry without a range",
             ask(driver.set_map, mapping.DirectMapping(memory_id=memory, perm=READ)),
             INVALID, "MALFORMED", dict(entry_index=0, field="range")),
            ("an entry that ends below its start",
             ask(driver.set_map, entry(memory, free), entry(memory, free + MIB, granules=-1)),
             INVALID, "INVALID_RANGE", dict(entry_index=1)),
            ("entries of a table that overlap",
             ask(driver.set_map, entry(memory, free), entry(memory, free)), INVALID,
             "OVERLAPPING_ENTRIES", dict(entry_index=1, other_index=0)),
            ("a table above the quota",
             ask(driver.set_map, *[entry(memory, free + n * GRANULE) for n in range(5)]),
             EXHAUSTED, "QUOTA_EXCEEDED", dict(quota="direct", limit=4, asked=5)),
            ("a hole", ask(driver.translate, PLACE, last + 1), MISSING, "NOT_MAPPED",
             dict(at=hex(last + 1))),
            ("less than was wanted", ask(driver.translate, PLACE, last, want=WRITE), DENIED,
             "PERM_TOO_SMALL", dict(mapping_start=hex(PLACE))),
            ("wanting nothing", ask(driver.translate, PLACE, last, want=0), INVALID,
             "UNKNOWN_PERM", {}),
            ("a translation that ends below its start", ask(driver.translate, 5, 4), INVALID,
             "INVALID_RANGE", {}),
            ("nothing to look up", ask(driver.lookup, free, free), MISSING, "NOT_MAPPED", {}),
            ("another domain than the session's",
             ask(driver.translate, PLACE, last, domain="domains/elsewhere"), MISSING,
             "NO_SUCH_DOMAIN", dict(domain="elsewhere")),
            ("the owner names no domain", owner("Lookup", range=wire_range(0, 0)), INVALID,
             "INVALID_NAME", {}),
            ("a domain that is not there", owner("ClearMap", domain="domains/none",
                                                ranges=wire_ranges([(0, 0)])),
             MISSING, "NO_SUCH_DOMAIN", {}),
            ("a byte of no memory",
             owner("ListMappings", domain=name, memory_offset=0), INVALID, "MALFORMED",
             dict(field="memory_id")),
            ("a reset without an aperture", reset_of_none(daemon), INVALID, "NO_APERTURE", {}),
        ]
        before = daemon.get(name)
        for what, work, code, reason, numbers in table:
            with report.check(f"{what}: {code.name} {reason}"):
                daemon.refuses(work, code, reason, **numbers)
        with report.check("none of these refusals has changed the table"):
            after = daemon.get(name)
            same((after.usage.direct_mappings, after.direct_generation),
                 (1, before.direct_generation))
        with report.check("a partial batch of direct mappings answers entry by entry"):
            answers = driver.map_direct(
                piece(memory, iova=free), piece(memory, iova=PLACE), partial=True).results
            same([one.WhichOneof("outcome") for one in answers], ["mapping", "refusal"])
            same(answers[1].refusal.reason, types.ERROR_REASON_OVERLAP)
        with report.check("the owner may end what a session has mapped"):
            request = mapping.UnmapDirectRequest(domain=name, ranges=wire_ranges([(0, limit)]))
            same(call(daemon.mappings.UnmapDirect, request).unmapped_mappings, 2)


def request_of(method, **request):
    return getattr(mapping, f"{method}Request")(**request)


def reset_of_none(daemon):
    def work():
        with a_domain(daemon, "none-to-reset", bounce_bytes=0) as name:
            request = mapping.ResetBounceRequest(domain=name)
            return call(daemon.mappings.ResetBounce, request)
    return work


def tables(report, daemon):
    with ExitStack() as stack:
        name = stack.enter_context(a_domain(daemon))
        driver = Driver(daemon, name)
        buffer = Buffer(MIB)
        for one in driver, buffer:
            stack.callback(one.close)
        memory = driver.session.register(buffer.memfd).memory_id

        def at(*numbers):
            return [entry(memory, PLACE + number * GRANULE) for number in numbers]

        with report.check("SetMap replaces the table and counts the difference"):
            first = driver.set_map(*at(0, 2, 4))
            same((first.added, first.removed), (3, 0))
            second = driver.set_map(*at(4, 6))
            same((second.added, second.removed), (1, 2))
            assert second.generation > first.generation
            same(daemon.get(name).direct_generation, second.generation)
        with report.check("the same table in another order changes nothing"):
            again = driver.set_map(*at(6, 4))
            same((again.added, again.removed, again.generation), (0, 0, second.generation))
        with report.check("a stale generation: ABORTED STALE_GENERATION"):
            daemon.refuses(
                lambda: driver.set_map(expected_generation=first.generation), STALE,
                "STALE_GENERATION", expected_generation=first.generation,
                direct_generation=second.generation)
            driver.set_map(*at(4, 6), expected_generation=second.generation)

        count = 20_000
        header = dict(header=mapping.SetMapHeader())
        many = at(*range(0, 2 * count, 2))
        chunks = [dict(entries=many[start:start + 3000]) for start in range(0, count, 3000)]
        with report.check(f"StreamSetMap takes {count} entries in chunks"):
            outcome = driver.stream_set_map(header, *chunks, dict(commit=True))
            # 4 and 6 are among them.
            same((outcome.added, outcome.removed), (count - 2, 0))
            same(daemon.get(name).usage.direct_mappings, count)
        with report.check("nothing but a complete stream changes the table"):
            for wrong in [
                [header, *chunks[:2]],
                chunks[:1],
                [header, header, dict(commit=True)],
                [header, dict(commit=True), dict(commit=True)],
                [],
            ]:
                daemon.refuses(lambda: driver.stream_set_map(*wrong), INVALID, "MALFORMED")
            same(daemon.get(name).direct_generation, outcome.generation)
        with report.check("an entry of a stream is named by its number in all of it"):
            bad = dict(entries=at(*range(2 * count, 2 * count + 5)) + [entry(99, PLACE - GRANULE)])
            refused = daemon.refuses(
                lambda: driver.stream_set_map(header, *chunks[:1], bad, dict(commit=True)),
                MISSING, "NO_SUCH_MEMORY", entry_index=3005, memory_id=99)
            assert refused.message.startswith("entry 3005: "), refused.message
        with report.check("too many entries are refused while the stream is still open"):
            quota = domain.UpdateDomainRequest(name=name, quotas=domain.Quotas(direct=count))
            call(daemon.domains.UpdateDomain, quota)
            one_more = [*chunks, dict(entries=at(2 * count)), dict(commit=True)]
            daemon.refuses(lambda: driver.stream_set_map(header, *one_more), EXHAUSTED,
                           "QUOTA_EXCEEDED", quota="direct", limit=count, asked=count + 1)
        with report.check("more than 16384 pieces: RESOURCE_EXHAUSTED QUOTA_EXCEEDED"):
            # Without a hole, and in no order that could be joined.
            dense = at(*range(count))
            dense = [dict(entries=dense[start:start + 3000]) for start in range(0, count, 3000)]
            driver.stream_set_map(header, *dense, dict(commit=True))
            last = PLACE + count * GRANULE - 1
            daemon.refuses(lambda: driver.translate(PLACE, last), EXHAUSTED, "QUOTA_EXCEEDED",
                           quota="pieces", limit=16384)
            same(len(driver.translate(PLACE, PLACE + 16384 * GRANULE - 1).pieces), 16384)
        with report.check("an empty table clears it"):
            same(driver.set_map().removed, count)


def repeated_requests(report, daemon):
    with ExitStack() as stack:
        name = stack.enter_context(a_domain(daemon))
        driver, other = Driver(daemon, name), Driver(daemon, name)
        buffer = Buffer(MIB)
        for one in driver, other, buffer:
            stack.callback(one.close)
        memory = driver.session.register(buffer.memfd).memory_id

        with report.check("a repeated MapDirect is done once and answers the same"):
            wanted = piece(memory, align_bytes=0)
            first = driver.map_direct(wanted, request_id="a")
            same(driver.map_direct(wanted, request_id="a"), first)
            same(daemon.get(name).usage.direct_mappings, 1)
        with report.check("the same id with another content: INVALID_ARGUMENT REQUEST_ID"):
            daemon.refuses(lambda: driver.map_direct(piece(memory), request_id="a"), INVALID,
                           "REQUEST_ID")
            daemon.refuses(lambda: driver.unmap_direct((0, 0), request_id="a"), INVALID,
                           "REQUEST_ID")
        with report.check("an id of 65 bytes: INVALID_ARGUMENT REQUEST_ID"):
            daemon.refuses(lambda: driver.set_map(request_id="x" * 65), INVALID, "REQUEST_ID",
                           bytes=65, most=64)
        with report.check("another session's ids are its own"):
            theirs = other.session.register(buffer.memfd).memory_id
            same(other.map_direct(piece(theirs), request_id="a").results[0].mapping.memory_id,
                 theirs)
            other.clear_map((PLACE, PLACE))
        with report.check("a refused request may be corrected and tried again under its id"):
            at = first.results[0].mapping.range.start
            over = piece(memory, iova=at)
            daemon.refuses(lambda: driver.map_direct(over, request_id="b"), EXISTS, "OVERLAP")
            driver.unmap_direct((at, at + GRANULE - 1))
            again = driver.map_direct(over, request_id="b")
            same(driver.map_direct(over, request_id="b"), again)
        with report.check("repeated removals, tables and resets answer as the first time"):
            inside = (at, at + GRANULE - 1)
            for do in [
                lambda: driver.unmap_direct(inside, request_id="unmap"),
                lambda: driver.set_map(entry(memory, PLACE), request_id="set"),
                lambda: driver.clear_map((PLACE, PLACE), request_id="clear"),
                lambda: driver.alloc(len_bytes=1, request_id="alloc"),
                lambda: driver.reset(request_id="reset"),
            ]:
                once = do()
                same(do(), once)
            usage = daemon.get(name).usage
            same((usage.direct_mappings, usage.coherent_allocations), (0, 1))
        with report.check("a repeated stream is the same in other chunks"):
            header = dict(header=mapping.SetMapHeader(request_id="stream"))
            one, two = entry(memory, PLACE), entry(memory, PLACE + MIB)
            once = driver.stream_set_map(header, dict(entries=[one, two], commit=True))
            same((once.added, once.removed), (2, 0))
            again = driver.stream_set_map(
                header, dict(entries=[one]), dict(entries=[two]), dict(commit=True))
            same(again, once)
            daemon.refuses(
                lambda: driver.stream_set_map(header, dict(entries=[two], commit=True)), INVALID,
                "REQUEST_ID")

    with report.check("a repeated CreateDomain and DeleteDomain answer as the first time"):
        create = domain.CreateDomainRequest(
            domain_id="twice", spec=domain.DomainSpec(bounce_bytes=MIB), request_id="make it")
        plan = domain.CreateDomainRequest()
        plan.CopyFrom(create)
        plan.validate_only = True
        call(daemon.domains.CreateDomain, plan)
        made = call(daemon.domains.CreateDomain, create)
        same(call(daemon.domains.CreateDomain, create).uid, made.uid)
        daemon.delete(made.name, request_id="end it")
        daemon.delete(made.name, request_id="end it")
        # Without the id it is another request, and the domain is gone.
        daemon.refuses(lambda: daemon.delete(made.name), MISSING, "NO_SUCH_DOMAIN")
