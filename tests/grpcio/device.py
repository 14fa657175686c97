"""A device in a process of its own: does what it is told, one JSON line each.

A subprocess and not a fork: grpcio does not survive one.
"""

import json
import sys

from domaind.v1 import mapping_pb2 as mapping
from domaind.v1 import types_pb2 as types

from clients import Session
from domaind_client.api import Api, call
from domaind_client.errors import Refused


def main(runtime_dir, domain):
    session = Session(runtime_dir, domain, types.ROLE_DEVICE)
    say({"session": session.name, "apertures": len(session.apertures)})
    api = Api(runtime_dir)
    for line in sys.stdin:
        say(obey(session, api.mappings, **json.loads(line)))
    api.close()


def obey(session, mappings, do, iova=0, length=0, data="", token=None):
    match do:
        case "read":
            return {"data": session.read(iova, length).hex()}
        case "write":
            session.write(iova, bytes.fromhex(data))
            return {}
        case "alloc":
            return alloc(mappings, token or session.attached.token.hex())
        case "detach":
            session.detach()
            return {}


def alloc(mappings, token):
    """Something that only drivers may do, in whoever's name."""
    request = mapping.AllocCoherentRequest(len_bytes=1)
    try:
        call(mappings.AllocCoherent, request, metadata=(("domaind-session", token),))
    except Refused as refused:
        return {"code": refused.code.name, "reason": refused.reason}
    return {}


def say(answer):
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
