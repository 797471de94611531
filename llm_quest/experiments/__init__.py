"""Paired experiments: variants of a recipe against a control, decided by a sequential test (`quest ablate`), and the
ledger of what was decided (`quest ledger`).

    arms ─► budgets ─► tuning (seeds 101..) ─► A/A pairs (seeds 301..) ─► pairs (seeds 1..) ─► verdict ─► ledger

A pair is one seed run for the control and for an arm. After every pair, from the fourth, the test may end the
experiment; how often one looks changes nothing about its error rates (`sequential.py`)."""
