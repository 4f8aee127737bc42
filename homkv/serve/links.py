"""Limits of the links between a dispatcher and its instances."""

from homkv.transport.endpoint import LinkOptions

# Every step of a decode instance is a message per stream: a dispatcher that is held up for a second must find them all
# when it comes back, not lose the connection. What frames may occupy is bounded by bytes, not by their number.
SERVING = LinkOptions(max_messages=65_536)
