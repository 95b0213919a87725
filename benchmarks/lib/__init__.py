"""Helpers of the benchmarks, and the scripts that they start as processes of their own."""
