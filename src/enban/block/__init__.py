"""The engine: contracts, the checked door, requests, locks and the mover.

`node` and `storage` are the two contracts everything else implements; `mover` is the
only place that moves guest bytes; `door` is the only way in.
"""
