"""The bench: enban and its peers side by side, in one run, on one machine.

The only figures this project quotes are ratios that come from here. Rules:

- Peer and enban alternate, and take turns at being first; a case is at least seven such pairs, its first
  (unmeasured) round also proves that both gave the same result.
- Every sample starts with its inputs freshly read into the page cache and its output removed.
- A row shows medians, their spread, the ratio peer time / our time against its goal, and for conversions
  the peak memory and the size of what was written.
- The harness itself stays small and imports nothing heavy: a process's recorded peak memory is never below
  what its parent held when it was started. What takes memory, as making inputs, is done by
  processes of their own.

`python -m bench --list` shows the cases; each is one entry in a `cases_*.py` file (see `case.py`).
"""
