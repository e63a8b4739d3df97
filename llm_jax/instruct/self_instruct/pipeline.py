"""Self-Instruct (Wang et al. 2022, arXiv 2212.10560): from seed tasks to many, round after round.

A round of one language:

1. `requests_per_round` prompts for instructions, each with examples drawn from seeds and from tasks accepted
   in the rounds before; what comes is filtered, and kept when it is like nothing in the pool.
2. Each kept instruction: is it classification?
3. Each kept instruction: its instances, input first, or for classification label first; filtered too. An
   instruction with no instance left is no task, but stays in the pool, so that it is not kept again.

A prompt depends on the settings and on the rounds before, so the whole run is a function of the settings and
of the answers. To go on after a kill is to run it again with the answers in the log.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_jax.instruct.self_instruct import parse, prompts
from llm_jax.instruct.self_instruct.filters import judge_drafts, judge_instruction
from llm_jax.instruct.self_instruct.generator import Answer, Request, seed_of
from llm_jax.instruct.self_instruct.novelty import Pool
from llm_jax.instruct.self_instruct.settings import SelfInstructConfig
from llm_jax.instruct.self_instruct.tasks import Instance, Task

CLASS_TOKENS = 8
CLASS_EXAMPLES = 4  # of each kind
INSTANCE_EXAMPLES = 4
STAGES = ("instructions", "class", "instances")

Ask = Callable[[Sequence[Request]], list[Answer]]


class Candidate(NamedTuple):
    """An instruction that was kept, on its way to a task."""

    text: str
    request: str  # key of the answer it stood in
    similarity: float  # ROUGE-L to the nearest of the pool when it came
    nearest: str  # that one


@dataclass
class Progress:
    """The state of one language: what it began with, what it has, what it has counted."""

    language: str
    seeds: list[Task]
    pool: Pool
    pool_texts: list[str]
    tasks: list[Task] = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)  # of each task when it came
    round: int = 0
    rounds_without: int = 0  # in a row
    ended: str = ""  # why
    requests: Counter[str] = field(default_factory=Counter)  # by stage
    failed: int = 0  # requests that got no usable answer
    unclear: int = 0  # instructions whose class was not told; taken for no classification
    instructions: Counter[str] = field(default_factory=Counter)  # "kept" and reasons
    instances: Counter[str] = field(default_factory=Counter)
    without_instance: int = 0


class Sink(NamedTuple):
    """Where tasks and rejects go as they come: rows of plain JSON values."""

    accept: Callable[[dict[str, Any]], None]
    reject: Callable[[dict[str, Any]], None]
    after_round: Callable[[Progress], None]


def run(
    config: SelfInstructConfig, seeds: dict[str, list[Task]], ask: Ask, sink: Sink
) -> dict[str, Progress]:
    """Runs rounds, languages in turn, until each has its target or is given up."""
    found = {language: _begin(language, seeds[language]) for language in config.languages}
    while not all(progress.ended for progress in found.values()):
        for progress in found.values():
            if not progress.ended:
                _Round(config, progress, ask, sink).run()
                progress.ended = _ended(config, progress)
                sink.after_round(progress)
    return found


def _begin(language: str, seeds: list[Task]) -> Progress:
    pool = Pool(language)
    for task in seeds:
        pool.add(task.instruction)
    return Progress(language, seeds, pool, [task.instruction for task in seeds])


def _ended(config: SelfInstructConfig, progress: Progress) -> str:
    if len(progress.tasks) >= config.target:
        return "target"
    if progress.requests.total() >= config.max_requests:
        return "budget"
    return "patience" if progress.rounds_without >= config.patience else ""


class _Round:
    """One round of one language."""

    def __init__(
        self, config: SelfInstructConfig, progress: Progress, ask: Ask, sink: Sink
    ) -> None:
        self._config, self._progress, self._sink = config, progress, sink
        self._send = ask

    def run(self) -> None:
        """Adds to the progress what the round gives."""
        progress = self._progress
        before = len(progress.tasks)
        candidates = self._instructions()
        kinds = self._classes(candidates)
        self._instances(candidates[: len(kinds)], kinds)
        progress.round += 1
        progress.rounds_without = 0 if len(progress.tasks) > before else progress.rounds_without + 1

    def _instructions(self) -> list[Candidate]:
        """Stage 1."""
        config, progress = self._config, self._progress
        asked = []
        for number in range(config.requests_per_round):
            key = self._key("instructions", number)
            prompt = prompts.instructions_prompt(
                progress.language, self._examples(random.Random(seed_of(config.seed, key)))
            )
            stop = prompts.instructions_stop(config.examples, config.instructions_per_request)
            asked.append(self._request(key, prompt, config.instruction_tokens, stop, sampled=True))
        kept = []
        for answer in self._ask(asked):
            found, cut_off = parse.instructions(answer.text, answer.finished)
            for number, text in enumerate(found[: config.instructions_per_request]):
                last = cut_off and number == len(found) - 1
                candidate = self._judge(text, answer.key, cut_off=last)
                if candidate:
                    kept.append(candidate)
        return kept

    def _examples(self, rng: random.Random) -> list[Task]:
        """Seeds and accepted tasks, in an order of chance."""
        config, progress = self._config, self._progress
        machine = rng.sample(progress.tasks, min(config.machine_examples, len(progress.tasks)))
        examples = [*rng.sample(progress.seeds, config.examples - len(machine)), *machine]
        rng.shuffle(examples)
        return examples

    def _judge(self, text: str, key: str, cut_off: bool) -> Candidate | None:
        """Filters one instruction; a kept one joins the pool."""
        config, progress = self._config, self._progress
        reason = (
            "cut off" if cut_off else judge_instruction(text, progress.language, config.filters)
        )
        candidate = None
        detail = ""
        if not reason:
            score, index = progress.pool.nearest(text)
            detail = progress.pool_texts[index]
            candidate = Candidate(text, key, score, detail)
            if score > config.filters.max_similarity:
                reason, detail = "too similar", f"{score:.3f} to: {detail}"
        progress.instructions[reason or "kept"] += 1
        if reason or candidate is None:
            self._reject("instruction", reason, text, key, detail)
            return None
        progress.pool.add(text)
        progress.pool_texts.append(text)
        return candidate

    def _classes(self, candidates: list[Candidate]) -> list[bool]:
        """Stage 2; shorter than the candidates when the budget is."""
        progress, asked = self._progress, []
        for number, candidate in enumerate(candidates):
            key = self._key("class", number)
            rng = random.Random(seed_of(self._config.seed, key))
            examples = []
            for kind in (True, False):
                of_kind = [t for t in progress.seeds if t.is_classification == kind]
                examples += rng.sample(of_kind, min(CLASS_EXAMPLES, len(of_kind)))
            rng.shuffle(examples)
            prompt = prompts.classify_prompt(progress.language, examples, candidate.text)
            asked.append(self._request(key, prompt, CLASS_TOKENS, ("\n",)))
        told = [parse.is_classification(answer.text) for answer in self._ask(asked)]
        progress.unclear += told.count(None)
        return [bool(kind) for kind in told]

    def _instances(self, candidates: list[Candidate], kinds: list[bool]) -> None:
        """Stage 3."""
        progress, asked = self._progress, []
        stop = prompts.instances_stop(progress.language)
        for number, (candidate, kind) in enumerate(zip(candidates, kinds, strict=True)):
            key = self._key("instances", number)
            rng = random.Random(seed_of(self._config.seed, key))
            of_kind = [task for task in progress.seeds if task.is_classification == kind]
            examples = rng.sample(of_kind, min(INSTANCE_EXAMPLES, len(of_kind)))
            prompt = prompts.instances_prompt(progress.language, examples, candidate.text, kind)
            asked.append(self._request(key, prompt, self._config.instance_tokens, stop))
        answers = self._ask(asked)
        for candidate, kind, answer in zip(candidates, kinds, answers, strict=False):
            self._finish(candidate, kind, answer)

    def _finish(self, candidate: Candidate, kind: bool, answer: Answer) -> None:
        """A task, if an instance is left."""
        progress, filters = self._progress, self._config.filters
        found, cut_off = parse.drafts(answer.text, kind, answer.finished)
        kept, rejected = judge_drafts(
            found, cut_off, candidate.text, progress.language, filters, kind
        )
        for draft, reason in rejected:
            progress.instances[reason] += 1
            text = f"{draft.input or ''}\n{draft.output or ''}"
            self._reject("instance", reason, text, answer.key, candidate.text)
        progress.instances["kept"] += len(kept)
        if not kept:
            progress.without_instance += 1
            self._reject("task", "no instance", candidate.text, answer.key, "")
            return
        task = Task(
            id=f"{progress.language}-{len(progress.tasks) + 1:06d}",
            language=progress.language,
            instruction=candidate.text,
            instances=tuple(kept),
            is_classification=kind,
        )
        progress.tasks.append(task)
        progress.similarities.append(candidate.similarity)
        for number, instance in enumerate(kept, start=1):
            self._sink.accept(_row(task, number, instance, candidate))

    def _key(self, stage: str, number: int) -> str:
        return f"{self._progress.language}/{self._progress.round}/{stage}/{number:02d}"

    def _request(
        self, key: str, prompt: str, max_tokens: int, stop: tuple[str, ...], sampled: bool = False
    ) -> Request:
        config = self._config
        return Request(
            key=key,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=config.temperature if sampled else 0.0,
            top_p=config.top_p if sampled else 1.0,
            stop=stop,
            seed=seed_of(config.seed, key),
        )

    def _ask(self, requests: list[Request]) -> list[Answer]:
        """The answers, of as many requests as the budget still has; a failed one has no text."""
        progress = self._progress
        left = self._config.max_requests - progress.requests.total()
        answers = self._send(requests[:left]) if requests[:left] else []
        for answer in answers:
            progress.requests[answer.key.split("/")[2]] += 1
            progress.failed += answer.finished == "failed"
        empty = [Answer(key=a.key, text="", finished="failed") for a in answers]
        return [e if a.finished == "failed" else a for a, e in zip(answers, empty, strict=True)]

    def _reject(self, what: str, reason: str, text: str, key: str, detail: str) -> None:
        row = {"what": what, "language": self._progress.language, "reason": reason}
        self._sink.reject({**row, "text": text, "detail": detail, "request": key})


def _row(task: Task, number: int, instance: Instance, candidate: Candidate) -> dict[str, Any]:
    """One line of the output: Alpaca's three fields, and where they come from."""
    return {
        "instruction": task.instruction,
        "input": instance.input,
        "output": instance.output,
        "id": f"{task.id}-{number}",
        "language": task.language,
        "is_classification": task.is_classification,
        "source": "self-instruct",
        "request": candidate.request,
        "similarity": round(candidate.similarity, 4),
        "nearest": candidate.nearest,
    }
