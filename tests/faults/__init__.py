"""Damaged, hostile and random input for everything that reads: `python -m tests.faults [KIND ...] --count 1000`."""
