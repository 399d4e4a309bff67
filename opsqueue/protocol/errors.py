"""What can be wrong with bytes from a peer. Says what and where; never decides what becomes of the connection."""

from __future__ import annotations


class ProtocolError(ValueError):
    """Bytes or values that the protocol does not allow; the text says what is wrong, and where."""


class BadJsonError(ProtocolError):
    """The bytes are not JSON (HTTP status 400)."""


class WrongShapeError(ProtocolError):
    """JSON whose shape is not the expected one (HTTP status 422)."""


class MessageError(ProtocolError):
    """A frame that is not one CBOR message of the expected direction."""


class StrategyError(ProtocolError):
    """A strategy that is unknown, too deep or of the wrong shape."""


class UnservableRequestError(MessageError):
    """A well-formed reserve request that can never be served: its strategy is unknown or too deep."""

    def __init__(self, nonce: int, reason: str) -> None:
        super().__init__(nonce, reason)
        self.nonce = nonce
        self.reason = reason

    def __str__(self) -> str:
        return self.reason
