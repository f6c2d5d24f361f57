"""Where bytes rest: files and memory. `host` alone knows the operating system."""
