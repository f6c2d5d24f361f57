"""What happens between a format and the place its bytes rest: storages in front of a storage.

`base.Filter` passes everything on; a filter defines only what it changes. `faults` makes
chosen calls fail, `delay` and `throttle` make them slow, `trace` tells of them, `writelog` keeps
a record of every change in memory and `logfile` in a file. `options` makes them by name, for
`--image-opts` and the API.
"""
