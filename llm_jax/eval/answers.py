"""How like a reference an answer is: exact match and ROUGE-L, in Chinese and English alike."""

from llm_jax.data import rouge


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are the same but for width, case and spacing."""
    return rouge.normalised(answer) == rouge.normalised(reference)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L over `rouge.units`, from 0 to 1; of two texts without content 1."""
    ours, theirs = rouge.units(answer), rouge.units(reference)
    return rouge.rouge_l(ours, theirs) if ours or theirs else 1.0
