"""What the RPC layer tells of its calls; what becomes of it is the listener's business."""

from __future__ import annotations

from d2o_server import errors


class CallObserver:
    """Listens to the calls of the inference service. This one makes nothing of it: override what is of interest."""

    def trace_id(self) -> str | None:
        """The W3C trace id of the call that runs in this task; None where it is not traced."""
        return None

    def call_ended(self, method: str, status: str, rejection: str | None) -> None:
        """A call ended with the gRPC status of this name; ``rejection``: why it was refused, where it was."""


def rejection_of(error: BaseException) -> str | None:
    """The short reason that a call is refused for; None for what is no refusal but a defect of ours."""
    if not isinstance(error, errors.ServerError) or isinstance(error, errors.EngineFailure):
        return None
    if isinstance(error, errors.Overloaded):
        return error.bound
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
