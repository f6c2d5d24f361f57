"""Pure bytes: parsers and builders of on-disk and on-wire structures.

Nothing here awaits, opens or logs. Parsers take bytes from strangers: they check every
number before anything is sized by it and raise ImageError or PeerError classes.
"""
