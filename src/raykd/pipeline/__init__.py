"""Pipeline: the stages of a run in order, with preflight checks, resume and the run record.

Begin with `run`.
"""
