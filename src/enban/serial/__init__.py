"""Serial lines: transports, the bridge that joins them, and the doctor of kernel-debugging sessions."""
