"""Teacher: serve the primed teacher, generate and score completions.

Begin with `generate` (the stage), then `completion_set` (its unit of work), `client` and `server`.
"""
