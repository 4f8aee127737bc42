"""Trace-driven simulation of prefill and decode instances: what a format of KV does to job completion times."""
