"""qcow, version 1.

    opening    header to node, the checks at the door
    node       the mapping and the allocation: guest range <-> clusters
    runs       many packed clusters at once
    barrier    the order in which changes reach the disk
    create, resize, upkeep, check

docs/formats/qcow.md describes the layout.
"""
