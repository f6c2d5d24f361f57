"""A guest on QEMU: process, monitor, disks, keyboard."""
