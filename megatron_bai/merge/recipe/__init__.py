"""Decide what a merge computes before any tensor is read: coefficients, regions, units, the output's form."""
