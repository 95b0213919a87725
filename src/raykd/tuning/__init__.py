"""Tuning: all trials of an experiment under Ray Tune, with Optuna and early stopping.

Begin with `trials` (which trials there are) and `tuner` (how they run).
"""
