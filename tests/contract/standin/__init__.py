"""A stand-in for Firecracker, for hosts on which that cannot run: its API, and QEMU behind it."""
