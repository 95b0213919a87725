"""Deployment callback: keeps the hub's tokens out of Ray's logs."""

from typing import Any

from raykd import compat

# Serve LLM copies these from a replica's environment into the runtime environment of its tasks, which Ray logs. The
# tasks need no copy: they run on the same nodes, whose environment holds the tokens.
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class StripTokensFromRuntimeEnv(compat.engine_callback()):
    """Serve LLM's callback before an engine loads: removes the tokens from the runtime environment."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in TOKEN_VARIABLES:
            (self.ctx.runtime_env or {}).get("env_vars", {}).pop(name, None)
