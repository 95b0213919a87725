"""Teacher: serve the primed teacher, generate and score completions.

Begin with `completion_set` (what identifies a set of completions), then `server`, `client` and `generate`.
"""
