"""The OpenAI API in front of a dispatcher.

Read in this order: ``schema`` (what may be asked), ``text`` (tokens become text, stop strings), ``generate`` (one
request as a stream of pieces), ``answers`` (pieces in OpenAI's shapes), ``limits`` (keys, sizes), ``app`` (OpenAI's
routes), ``service`` (health, metrics, records, and ``page.html``, which shows them).
"""
