"""How KV moves between machines.

Read in this order: ``wire`` (one frame: bytes, digest, refusals), ``assemble`` (frames of a sequence become layers),
``keys`` (who may connect), ``endpoint`` (limits and settings of a connection), ``link`` (its two ends), ``sender``
(layers out, in the background), ``shaper`` (a slower link than the real one), ``lease`` (a promise that expires).
"""
