"""A client of domaind: a session on the fd socket, and calls over gRPC.

`session` needs the standard library and the generated messages only; `api` needs
grpcio as well.
"""

# How long a request may take. An answer that has not come by then is not coming.
TIMEOUT_SECONDS = 20
