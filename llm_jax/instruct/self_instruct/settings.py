"""Everything a Self-Instruct run depends on."""

from dataclasses import dataclass
from typing import Literal

from llm_jax.errors import ConfigError
from llm_jax.instruct.self_instruct.endpoint import EndpointConfig

Language = Literal["en", "zh"]
MAX_SEED = 2**32

# may differ when a run goes on: they say how long, and where the generator is, but not what is asked of whom
# (a model of ours is known by the fingerprints of its arrays)
FREE = (
    "output", "target", "max_requests", "patience", "model", "endpoint.url", "endpoint.key_variable",
    "endpoint.concurrency", "endpoint.timeout_seconds", "endpoint.attempts",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which instructions and instances are worth keeping; the figures are the paper's where it has them."""

    min_words: int = 4  # of an English instruction
    max_words: int = 150
    min_characters: int = 4  # of a Chinese instruction, blanks not counted
    max_characters: int = 300
    keywords: tuple[str, ...] = ()  # further words that no instruction may hold, in either language
    max_similarity: float = 0.7  # ROUGE-L to any instruction of the pool
    max_instance_similarity: float = 0.9  # ROUGE-L to another instance of the same task
    max_instances: int = 5  # of one task

    def __post_init__(self) -> None:
        for unit in ("words", "characters"):
            least, most = (
                (self.min_words, self.max_words)
                if unit == "words"
                else (self.min_characters, self.max_characters)
            )
            if not 1 <= least <= most:
                raise ConfigError(
                    f"filters.min_{unit}={least} must be at least 1 and at most filters.max_{unit}={most}"
                )
        for name, value in (
            ("max_similarity", self.max_similarity),
            ("max_instance_similarity", self.max_instance_similarity),
        ):
            if not 0 < value < 1:
                raise ConfigError(
                    f"filters.{name}={value} must be above 0 and below 1; 1 would keep exact copies"
                )
        if self.max_instances < 1:
            raise ConfigError(f"filters.max_instances={self.max_instances} must be at least 1")
        if any(not word.strip() for word in self.keywords):
            raise ConfigError(
                "filters.keywords holds an empty word, which is everywhere; remove it"
            )


@dataclass(frozen=True, kw_only=True)
class SelfInstructConfig:
    """Instructions and their instances, bootstrapped from seeds (Wang et al. 2022, arXiv 2212.10560)."""

    output: str  # folder of the run; one that is there already is continued
    languages: tuple[Language, ...] = ("en", "zh")  # each has its own seeds, pool and rounds
    target: int = 1000  # tasks of each language, after which no round begins
    max_requests: int = 20_000  # the budget: most requests of each language
    patience: int = 20  # rounds without a new task, after which a language is given up
    seeds: tuple[str, ...] = ()  # JSONL files of seed tasks; empty: those of this package
    model: str = ""  # a model of ours that writes: run folder, checkpoint, imported model
    step: int = -1  # which checkpoint of a run folder; -1: the newest
    batch_size: int = 32  # prompts that our model continues at once
    endpoint: EndpointConfig = EndpointConfig()  # or a server
    seed: int = 0
    requests_per_round: int = 8  # for instructions; their answers share one state of the pool
    human_examples: int = 6  # seeds in a prompt for instructions
    machine_examples: int = 2  # accepted tasks in it; seeds until there are enough
    instructions_per_request: int = 8  # how many new ones a prompt asks for
    temperature: float = 0.7  # for instructions; everything else takes the likeliest
    top_p: float = 0.5
    instruction_tokens: int = 1024  # most tokens of an answer with instructions
    instance_tokens: int = 512  # most tokens of an answer with instances
    filters: FilterConfig = FilterConfig()

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("output='' must name a folder, as in --output runs/tasks")
        if not self.languages or len(set(self.languages)) < len(self.languages):
            raise ConfigError(
                f"languages={list(self.languages)} must name en, zh or both, each once"
            )
        for name, value, least in (
            ("target", self.target, 1),
            ("max_requests", self.max_requests, 1),
            ("patience", self.patience, 1),
            ("batch_size", self.batch_size, 1),
            ("requests_per_round", self.requests_per_round, 1),
            ("human_examples", self.human_examples, 1),
            ("machine_examples", self.machine_examples, 0),
            ("instructions_per_request", self.instructions_per_request, 1),
            ("instruction_tokens", self.instruction_tokens, 16),
            ("instance_tokens", self.instance_tokens, 16),
        ):
            if value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature={self.temperature} must be from 0 to 2")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"seed={self.seed} must be from 0 to {MAX_SEED - 1}")

    @property
    def examples(self) -> int:
        """How many examples a prompt for instructions shows."""
        return self.human_examples + self.machine_examples
