"""Exit status 0 if the Flower process of this container says that it serves.

Flower's health server has no TLS; it listens on the container's own loopback only.
"""

import os
import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

try:
    with grpc.insecure_channel(os.environ["HEALTH_ADDRESS"]) as channel:
        answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=3)
except grpc.RpcError as error:
    sys.exit(f"no answer: {error.code().name}")
sys.exit(answer.status != HealthCheckResponse.SERVING)
