"""Offline vLLM: the peer of generation and of evaluation, without Ray. `LLM.chat`, all prompts at once.

Each line of standard input is a job as JSON, each line of standard output what it took:

    {"conversations": FILE, "max_tokens": 64, "top_k": 0, "adapter": FOLDER}
    {"tokens": ..., "seconds": ..., "engine_seconds": ...}

The one argument is JSON, too: vLLM's engine arguments.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[1]), disable_log_stats=False)
    for line in sys.stdin:
        print(json.dumps(run(llm, json.loads(line))), file=answers, flush=True)


def run(llm: Any, job: dict[str, Any]) -> dict[str, float]:
    """Answers all conversations, greedily.

    Returns:
        tokens written; seconds of the call; seconds from the first prompt that the engine took up to the last token.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    conversations = json.loads(Path(job["conversations"]).read_text())
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=job.get("top_k") or None)
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job.get("adapter") else None
    started = time.monotonic()
    outputs = llm.chat(conversations, params, use_tqdm=False, lora_request=adapter)
    seconds = time.monotonic() - started
    told = [output.metrics for output in outputs]
    engine = max(each.last_token_ts for each in told) - min(each.scheduled_ts for each in told)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tokens": tokens, "seconds": seconds, "engine_seconds": engine}


if __name__ == "__main__":
    main()
