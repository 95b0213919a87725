"""raykd: distill large language models on Ray, and measure what the prompt given to the teacher was worth."""

__version__ = "0.2.0"
