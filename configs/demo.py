"""The model of the demo: 4.7 million parameters, English documentation and Chinese prose, on a CPU.

Run:     bash tools/demo.sh            (makes the tokenizer and shards too)
         llm-jax pretrain configs/demo.py --data.prepared runs/demo/data --run runs/again
Expect:  4,720,896 parameters; in 5 minutes on two cores 1.93 bits per character of held-out
         English and 8.02 of Chinese (bash tools/demo.sh; a trigram reaches 2.93 and 8.11).
"""

from llm_jax.run.demo import demo_config
from llm_jax.run.pretrain import PretrainConfig


def config() -> PretrainConfig:
    """What `llm-jax demo` trains."""
    return demo_config(prepared="runs/demo/data", run="runs/demo-again")
