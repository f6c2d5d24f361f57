"""qcow2, versions 2 and 3.

    opening    header to node, the checks at the door
    node       an open image: its tables, and the calls of the node contract
    mapping    L2 entries to extents; runs: the same in bulk
    allocation space for writes; clearing: zeroing and discarding
    tables     L1 and the cache of L2 tables
    refcounts  which host clusters are in use
    barrier    the order in which changes reach the disk
    switch     all tables at once: the ground of snapshots
    create, resize, upkeep, facts
    check*, findings, repair

docs/formats/qcow2.md describes the layout.
"""
