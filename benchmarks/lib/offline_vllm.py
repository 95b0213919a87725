"""Offline vLLM: the peer of generation and evaluation: `LLM.chat` without Ray, all prompts in one call.

Each line of standard input is a task as JSON, and each line of standard output its result:

    {"conversations": FILE, "max_tokens": 64, "top_k": 0, "adapter": FOLDER}
    {"tokens": ..., "seconds": ..., "engine_seconds": ...}

The only argument is vLLM's engine arguments as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    # Libraries print to standard output too: they get standard error instead.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[1]), disable_log_stats=False)
    for line in sys.stdin:
        print(json.dumps(run(llm, json.loads(line))), file=results, flush=True)


def run(llm: Any, task: dict[str, Any]) -> dict[str, float]:
    """Generate an answer to each conversation, greedily.

    Returns:
        Generated tokens; seconds of the call; seconds from the first scheduled prompt to the last token.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    conversations = json.loads(Path(task["conversations"]).read_text())
    params = SamplingParams(temperature=0, max_tokens=task["max_tokens"], logprobs=task.get("top_k") or None)
    adapter = LoRARequest("adapter", 1, task["adapter"]) if task.get("adapter") else None
    started = time.monotonic()
    outputs = llm.chat(conversations, params, use_tqdm=False, lora_request=adapter)
    seconds = time.monotonic() - started
    metrics = [output.metrics for output in outputs]
    engine = max(m.last_token_ts for m in metrics) - min(m.scheduled_ts for m in metrics)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tokens": tokens, "seconds": seconds, "engine_seconds": engine}


if __name__ == "__main__":
    main()
