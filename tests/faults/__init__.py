"""Faults made on purpose: nothing may be left, nobody let in, and every wait must end."""
