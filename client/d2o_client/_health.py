"""The two messages of grpc.health.v1, described here so that they need no further package.

They live in a descriptor pool of their own: the health-checking package may register the same names beside them.
"""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from d2o_client._types import HealthStatus

_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
_FIELD = descriptor_pb2.FieldDescriptorProto


def _health_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="grpc/health/v1/health.proto", package="grpc.health.v1")
    file.syntax = "proto3"
    request = file.message_type.add(name="HealthCheckRequest")
    request.field.add(name="service", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
    response = file.message_type.add(name="HealthCheckResponse")
    response.field.add(name="status", number=1, type=_FIELD.TYPE_INT32, label=_FIELD.LABEL_OPTIONAL)
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_health_file().SerializeToString())


def _message_class(name: str) -> type[message.Message]:
    found: type[message.Message] = message_factory.GetMessageClass(_pool.FindMessageTypeByName(name))
    return found


HealthCheckRequest = _message_class("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = _message_class("grpc.health.v1.HealthCheckResponse")


def health_status(response: message.Message) -> HealthStatus:
    """The state that a HealthCheckResponse reports; a value that the protocol does not know reads as UNKNOWN."""
    number: int = getattr(response, "status")  # noqa: B009 - the field exists only at run time
    return HealthStatus[_STATUSES[number]] if number < len(_STATUSES) else HealthStatus.UNKNOWN
