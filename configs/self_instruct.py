"""A thousand tasks in each language from this package's seeds, written by a server or by a model of ours.

Run:     llm-jax self-instruct configs/self_instruct.py --endpoint.url http://localhost:8000/v1 --endpoint.model NAME
         llm-jax self-instruct configs/self_instruct.py --model MODEL --output runs/tasks-own
Expect:  runs/tasks/tasks.jsonl, Alpaca's format, for llm-jax data conversations; report.html with counts by
         filter and tables of verbs and topics. About two requests a task and one for eight candidates. How
         many tasks are good depends on who writes: of the paper's own 200 samples 46 % had some problem.
"""

from llm_jax.instruct.self_instruct import SelfInstructConfig


def config() -> SelfInstructConfig:
    """The paper's settings; who writes is given on the command line."""
    return SelfInstructConfig(output="runs/tasks", languages=("en", "zh"), target=1000)
