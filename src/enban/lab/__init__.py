"""The integrity lab: does a disk keep what it promised, whatever happens to it?

The fault model and the promises are in docs/durability.md; everything here follows from them.

    images            kinds of image to work on: how each is made, opened, and read by other eyes
    workload          operations by seed, as a script a person can read; doing them
    oracle            what each sector may hold, now and after a crash
    crash_states      what a power cut may leave, from the record of all storage calls
    crash             the crash explorer: every state checked, compared, a sample opened and used
    faultwalk         each storage call fails, in each way it can; full disks, pretended and real
    history, storm    overlapping requests with cancellations; what serial orders explain
    live              commits and pulls of a disk in use, in a storm
    kill              a server process under load, killed at random moments
    fuzz, damage      images broken with knowledge of their structure
    blackbox, peer    other people's servers; QEMU's own qcow2 through its write log
    qcow2_reader, qcow_reader   independent readers: they share no code with the engine
    campaign, findings, shrink  running it all for a time, and what is kept of a failure

The rule: a run is given by a seed and the commit; what a check needs to know of a format comes
from the independent readers, never from the engine that is being tested.
"""
