"""Hub tokens: they stay in the environment of the nodes, and out of what Ray writes into its logs."""

from typing import Any

from raykd import compat

# What Serve LLM copies from a replica's environment into the runtime environment of the tasks that it starts, which
# Ray logs. These tasks have it of their own: they run on the same nodes.
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class StripTokensFromRuntimeEnv(compat.engine_callback()):
    """Serve LLM's callback for what is done before an engine loads."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in TOKEN_VARIABLES:
            (self.ctx.runtime_env or {}).get("env_vars", {}).pop(name, None)
