"""Prefill and decode on devices of their own, measured: requests in, job completion times out.

Read in this order: ``workload`` (who asks for what, when), ``messages`` (what coordinator and workers say), ``forms``
(how a format's KV leaves a prompt and crosses), ``slots`` (where it lies while it decodes), ``batch`` (continuous
batching), ``sockets`` ``direct`` ``nixl`` (three ways to move bytes), ``prefill`` ``decode`` ``worker`` (processes),
``pool`` (start and stop them), ``probe`` (steps at rest), ``plan`` ``run`` (cells, budget, record).
"""
