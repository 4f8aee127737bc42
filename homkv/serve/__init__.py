"""Prefill and decode as two processes, with the pages as the only KV that moves between them."""
