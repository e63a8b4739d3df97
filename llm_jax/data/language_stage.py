"""The stage `llm-jax data language`: sources split by language, with a quality score where asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llm_jax.data import second_opinion
from llm_jax.data.documents import Rejects
from llm_jax.data.language import identify
from llm_jax.data.lineage import input_record
from llm_jax.data.ngram_score import Reference, train
from llm_jax.data.second_opinion import Opinion, differ, lingua_opinion
from llm_jax.data.sift import Judge, Judgement, SiftConfig, sift
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LanguageStage(SiftConfig):
    """Which languages to keep, and what their text should be like."""

    keep: tuple[str, ...] = ()  # language codes; empty keeps all
    references: tuple[SourceConfig, ...] = ()  # name: a language; its texts train the score of it
    max_bits: float = 0.0  # drop what scores more bits per character; 0 only scores
    second_opinion: bool = (
        False  # ask lingua too, and count where it differs; needs the extra [lid]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_bits < 0 or (self.max_bits and not self.references):
            raise ConfigError(
                f"max_bits={self.max_bits} must be 0 or more, and needs a reference to score by"
            )


def language_stage(
    config: LanguageStage, progress: Callable[[str, str], None] = lambda _name, _text: None
) -> dict[str, Any]:
    """Writes OUTPUT/SOURCE.LANGUAGE for each language kept; returns the manifest.

    Raises:
      DataError, ConfigError: as `sift`; a reference that is too small.
    """
    if config.second_opinion:
        second_opinion.check_installed()
    models = {}
    for source in config.references:
        texts = (document.text for document in read_documents(source, Rejects()))
        models[source.name] = train(texts)
    quantiles = {name: model.quantiles for name, model in models.items()}
    records = {source.name: input_record(source) for source in config.references}
    settings = (config.keep, models, config.max_bits, config.second_opinion)
    return sift(
        *("language", config, config, language_judge, settings, progress),
        references={name: {**records[name], "bits": quantiles[name]} for name in models},
    )


def language_judge(
    keep: tuple[str, ...], models: dict[str, Reference], max_bits: float, second: bool = False
) -> Judge:
    """The judge that workers build."""
    judge = partial(_judge, keep, models, max_bits)
    return with_opinion(judge, lingua_opinion()) if second else judge


def with_opinion(judge: Judge, opinion: Opinion) -> Judge:
    """The judge with a remark on texts whose language somebody else sees differently."""

    def judge_twice(text: str) -> Judgement:
        judgement, second = judge(text), opinion(text)
        language = identify(text).language
        if not differ(language, second):
            return judgement
        fields = (*judgement.fields, ("second_opinion", second))
        return judgement._replace(remark=f"{language}, lingua says {second}", fields=fields)

    return judge_twice


def _judge(
    keep: tuple[str, ...], models: dict[str, Reference], max_bits: float, text: str
) -> Judgement:
    language, shares = identify(text)
    if keep and language not in keep:
        told = ", ".join(f"{script} {share:.0%}" for script, share in shares.items())
        return Judgement(False, language, detail=told or "no letters")
    fields: tuple[tuple[str, Any], ...] = (("language", language),)
    if language in models:
        bits = models[language].bits(text)
        fields = (*fields, ("bits", round(bits, 3)))
        if max_bits and bits > max_bits:
            detail = f"{bits:.3f} bits per character > {max_bits:g}"
            return Judgement(False, f"{language}, unlike the reference", detail=detail)
    return Judgement(True, language, suffix=f".{language}", fields=fields)
