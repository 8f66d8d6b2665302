"""Whether a program of a federation serves: the standard gRPC health question, asked once.

An agent answers it on its Unix socket; Flower's programs where ``--health-server-address`` says.
Nothing heavy is imported, since a container asks every half minute.
"""

from __future__ import annotations

import re

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlr.errors import ConfigError, RunError

_ADDRESS = re.compile(r"unix:/.+|[^\s:/]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}")

_OPTIONS = (("grpc.enable_http_proxy", 0),)
"""What is asked is on this machine: a proxy of the environment must not get the question."""


def check(address: str, seconds: float = 5.0) -> None:
    """Return if the program at ``address`` serves.

    Args:
        address: ``unix:/path/of/the/socket``, or ``host:port``.
        seconds: For how long to wait for the answer, > 0.

    Raises:
        ConfigError: The address or the seconds cannot be meant.
        RunError: Nobody answers in time, or the answer is another one.
    """
    problems = []
    if not _ADDRESS.fullmatch(address):
        problems.append(
            f"address {address!r} must be unix:/path/of/a/socket or host:port, e.g. 127.0.0.1:8001"
        )
    if not 0 < seconds < float("inf"):
        problems.append(f"--seconds {seconds:g} must be > 0 and finite")
    if problems:
        raise ConfigError(problems)
    request, kinds = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
    try:
        with grpc.insecure_channel(address, options=_OPTIONS) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=seconds)
    except grpc.RpcError as error:
        raise RunError(
            f"{address} does not answer ({error.code().name.lower()}); is the program up, has it "
            "loaded its model, and may this user open the place?"
        ) from error
    if answer.status != kinds.SERVING:
        name = kinds.ServingStatus.Name(answer.status)
        raise RunError(f"{address} answers {name}, not SERVING; its own log says why")
