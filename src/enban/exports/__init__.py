"""How others reach a disk.

nbd         over NBD
vhost       by vhost-user, from a virtual machine's memory
sockets     where to listen: unix, TCP, descriptors handed over by systemd
process     what every server needs as a process: its disk, signals, a pid file
"""
