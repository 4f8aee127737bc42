"""Every error a user can meet. The message says what was expected, what was found, and the remedy."""


class HomkvError(Exception):
    """Base of all homkv errors: ``except HomkvError`` catches every one of them."""


class ShapeError(HomkvError, ValueError):
    """A tensor or a length does not have the shape that the formula needs."""


class DTypeError(HomkvError, TypeError):
    """A tensor's dtype is not one that this function computes on."""


class FormatError(HomkvError, ValueError):
    """A format name, a stored page or a value that a format cannot hold."""


class CapacityError(HomkvError, RuntimeError):
    """Not enough free pages or sequence slots. Nothing was written; free something or retry later."""


class TransferError(HomkvError, RuntimeError):
    """Bytes that crossed the wire cannot be trusted or did not arrive. They were not used."""


class TraceError(HomkvError, ValueError):
    """A trace, a record of requests or a table of step times that cannot be used; the message names the line."""


class UnsupportedError(HomkvError, NotImplementedError):
    """A combination that homkv does not compute; the message names the alternative."""
