"""QEMU's user network: the addresses that every guest has on it, and finds there."""

GUEST_ADDRESS = "10.0.2.15"
PREFIX_LENGTH = 24
NETWORK = f"10.0.2.0/{PREFIX_LENGTH}"
GATEWAY = "10.0.2.2"
GATEWAY_MAC = "52:55:0a:00:02:02"
NAME_SERVER = "10.0.2.3"
