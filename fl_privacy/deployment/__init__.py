"""A real federation on one machine: SuperLink, SuperNodes and apps as processes over gRPC.

The topology is that of ``docker/compose.yaml``; ``fl-privacy deploy`` brings it up, and
docs/deployment.md explains it.
"""
