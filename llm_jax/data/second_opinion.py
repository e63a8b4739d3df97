"""A second opinion on a text's language, from lingua, whose models are inside its package: the extra `[lid]`.

It decides nothing. Where it differs from `language.identify` the report counts it and shows samples: what lingua calls
English among Chinese pages is mostly code, what it calls French in a source of English is worth a look.
"""

import importlib.util
from collections.abc import Callable

from llm_jax.errors import ConfigError

# those told by script, and the common ones in Latin script: fewer are faster and surer
LANGUAGES = (
    *("CHINESE", "ENGLISH", "JAPANESE", "KOREAN", "RUSSIAN", "FRENCH", "GERMAN", "SPANISH"),
    *("PORTUGUESE", "ITALIAN", "DUTCH", "POLISH", "TURKISH", "VIETNAMESE", "INDONESIAN"),
)
NOT_LATIN = frozenset(("zh", "ja", "ko", "ru"))
LOOKED_AT = 2000  # characters
Opinion = Callable[[str], str]


def check_installed() -> None:
    """Raises ConfigError where lingua is missing."""
    if importlib.util.find_spec("lingua") is None:
        raise ConfigError(
            "second_opinion needs lingua; pip install 'llm-jax[lid]', or leave --second-opinion out"
        )


def lingua_opinion() -> Opinion:
    """The function text -> ISO 639-1 code, "" where lingua has no opinion.

    With trigrams alone: on documents the answers are those of all its models, at 60 MB instead of 300 and
    600 English or 3,000 Chinese documents a second (measured on ../shared/corpus).
    """
    from lingua import Language, LanguageDetectorBuilder  # pyright: ignore[reportMissingImports]

    known = [getattr(Language, name) for name in LANGUAGES]
    detector = LanguageDetectorBuilder.from_languages(*known).with_low_accuracy_mode().build()

    def opinion(text: str) -> str:
        found = detector.detect_language_of(text[:LOOKED_AT])
        return found.iso_code_639_1.name.lower() if found else ""

    return opinion


def differ(language: str, second: str) -> bool:
    """Whether a verdict of `language.identify` and a second opinion cannot both be right."""
    if not second or language == "und":
        return False
    if language == "latin":  # any but English
        return second == "en" or second in NOT_LATIN
    return language != second
