"""Deployment callback: what Serve LLM does on the nodes before an engine loads."""

from pathlib import Path
from typing import Any

from raykd import compat

# Serve LLM copies these from a replica's environment into the runtime environment of its tasks, which Ray logs. The
# tasks need no copy: they run on the same nodes, whose environment holds the tokens.
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class PrepareNodes(compat.engine_callback()):
    """Serve LLM's callback before an engine loads: removes secrets, and skips a download that is not needed.

    A task on each node would download the model, after it has imported vLLM. The files of a folder are there already.
    """

    def __init__(self, llm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(llm_config, *args, **kwargs)
        for name in TOKEN_VARIABLES:
            (self.ctx.runtime_env or {}).get("env_vars", {}).pop(name, None)
        source = llm_config.model_loading_config.model_source
        self.ctx.run_init_node = not (isinstance(source, str) and Path(source).is_absolute())
