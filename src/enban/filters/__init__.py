"""What happens between a format and the place its bytes rest: storages in front of a storage.

`base.Filter` passes everything on; a filter defines only what it changes. `faults` makes
chosen calls fail, `delay` makes them slow, `writelog` keeps a record of every change.
"""
