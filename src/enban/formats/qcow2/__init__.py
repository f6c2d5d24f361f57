"""qcow2, versions 2 and 3.

    opening    header to node, the checks at the door
    node       the mapping and the allocation: guest range <-> clusters
    tables     L1 and the cache of L2 tables
    refcounts  which host clusters are in use
    barrier    the order in which changes reach the disk
    create, resize, check, repair

docs/formats/qcow2.md describes the layout.
"""
