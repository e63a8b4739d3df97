"""The model of the demo: 4.7 million parameters, English documentation and Chinese prose, on a CPU.

Run:     bash tools/demo.sh            (makes the tokenizer and shards too)
         llm-jax pretrain configs/demo.py --data.prepared runs/demo/data --run runs/again
Expect:  4,720,896 parameters; see README.md for minutes and bits per character.
"""

from llm_jax.run.demo import demo_config
from llm_jax.run.pretrain import PretrainConfig


def config() -> PretrainConfig:
    """What `llm-jax demo` trains."""
    return demo_config(prepared="runs/demo/data", run="runs/demo-again")
