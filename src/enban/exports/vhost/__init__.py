"""A disk as a vhost-user-blk device: a guest's requests taken from its virtqueues, data read into its memory.

server    a socket and who is connected to it: one front-end at a time
session   the front-end's messages: memory, rings, features, configuration
queue     one thread a virtqueue: wait, take, answer, tell
requests  one request by all the rules
memory    the front-end's files mapped, and the log of pages written
"""

from .server import Server
from .spin import SPIN_US

__all__ = ["SPIN_US", "Server"]
