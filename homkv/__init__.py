"""Attention computed directly on a 2-bit KV cache, so that prefill and decode can run on different machines."""
