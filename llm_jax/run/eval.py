"""`llm-jax eval MODEL --data FOLDER`: how well a model predicts held-out text, source by source.

Text is the held-out split of prepared data, or `--text` sources as for `data prepare`. Prints nats
per token, PPL, bits per byte and bits per character with 95 % intervals, and writes them with all
counts to `eval.json` in the run folder (beside the checkpoint of a model that has none).

Prepared conversations are scored by the text of their answers alone; `--tasks` lets the model answer,
see `eval_tasks`.

`--baselines` adds, for scale, bits per character of `xz` and of a character trigram on the same text.
Both may learn from training text where there is some: prepared data has it, `--text` has not.
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from llm_jax.config import to_dict
from llm_jax.errors import ConfigError, DataError
from llm_jax.run import cli

if TYPE_CHECKING:
    from llm_jax.api import Model
    from llm_jax.data.shards import Prepared, Split
    from llm_jax.eval.perplexity import EvalResult
    from llm_jax.eval.windows import Corpus, EvalConfig

# xz -9e packs about 1 MB/s, the trigram counts some 4 MB/s
PRIMER_CHARACTERS = 4_000_000
TRIGRAM_CHARACTERS = 20_000_000
HELDOUT_CHARACTERS = 4_000_000


def main(argv: list[str]) -> None:
    """Runs the command."""
    arguments = make_parser().parse_args(argv)
    if sum(map(bool, (arguments.data, arguments.text, arguments.tasks))) != 1:
        raise ConfigError("llm-jax eval: give one of --data FOLDER, --text SOURCE and --tasks FILE")
    if arguments.against and not arguments.tasks:
        raise ConfigError("llm-jax eval: --against MODEL compares answers; give --tasks FILE too")
    if arguments.tasks:
        from llm_jax.run import eval_tasks

        return eval_tasks.main(arguments)

    from llm_jax import load
    from llm_jax.checkpoint import write_json_atomic
    from llm_jax.eval.windows import EvalConfig

    config = EvalConfig(
        seq_len=arguments.seq_len,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        max_documents=arguments.max_documents,
        max_tokens=arguments.max_tokens,
    )
    model = load(arguments.model, arguments.step)
    if arguments.data:
        prepared = open_for(model, arguments.data, None if arguments.baselines else ())
        result, baselines = evaluate_prepared(model, prepared, config, arguments.baselines)
        text: Any = {"data": os.fspath(prepared.folder), "digest": prepared.digest}
    else:
        result, baselines = evaluate_texts(model, arguments.text, config, arguments.baselines)
        text = {"text": arguments.text}

    console = Console()
    for table in make_tables(result, baselines):
        console.print(table)
    report = {
        "model": model.path,
        "step": model.step,
        "tokenizer_fingerprint": model.tokenizer.fingerprint,
        **text,
        "config": to_dict(config.resolve(model.config.max_seq_len, hard_limit=False)),
        "results": result.to_dict(),
        "baselines_bits_per_character": baselines,
    }
    out = Path(arguments.out) if arguments.out else beside(Path(model.path))
    write_json_atomic(out, finite(report))
    console.print(f"written to {out}", soft_wrap=True, highlight=False)


def make_parser() -> cli.Parser:
    """The options, with the defaults of `EvalConfig`."""
    parser = cli.Parser(prog="llm-jax eval", description="measure a model on held-out text")
    add = parser.add_argument
    add("model", help="a run folder, one of its checkpoints, or an imported model folder")
    add("--step", type=int, default=-1, help="checkpoint of a run folder (default: the newest)")
    add("--data", default="", metavar="FOLDER", help="prepared data; its held-out split is scored")
    add(
        "--text",
        action="append",
        default=[],
        metavar="SOURCE",
        help="NAME=PATH, as in data prepare",
    )
    add("--seq-len", type=int, default=0, help="tokens a target may see (default: the model's)")
    add("--stride", type=int, default=0, help="new targets per window (default: half of seq-len)")
    add("--batch-size", type=int, default=8, help="rows at once (default: 8)")
    add("--max-documents", type=int, default=0, help="of every source; 0: all (default)")
    add("--max-tokens", type=int, default=0, help="of every source; 0: all (default)")
    add(
        "--tasks", default="", metavar="FILE", help="conversations; the last answers are references"
    )
    add("--against", default="", metavar="MODEL", help="a second model on the same tasks")
    add("--max-new-tokens", type=int, default=128, help="of an answer to a task (default: 128)")
    add("--temperature", type=float, default=0.0, help="of answers; 0: the likeliest (default)")
    add("--baselines", action="store_true", help="also xz and a character trigram, for scale")
    add(
        "--out",
        default="",
        metavar="FILE",
        help="where the JSON goes (default: eval.json, or tasks.json, by MODEL)",
    )
    return parser


def open_for(model: "Model", folder: str, sources: Collection[str] | None = None) -> "Prepared":
    """Prepared data that fits the model, `sources` as in `open_prepared`. Raises DataError if it was made with another tokenizer."""
    from llm_jax.data.shards import open_prepared

    prepared = open_prepared(folder, sources=sources)
    if prepared.tokenizer_fingerprint != model.tokenizer.fingerprint:
        raise DataError(
            f"{folder}: prepared with tokenizer {prepared.tokenizer_fingerprint[:12]}, but the model "
            f"uses {model.tokenizer.fingerprint[:12]}; prepare it again with --tokenizer "
            f"{Path(model.path) / 'tokenizer'}"
        )
    return prepared


def evaluate_prepared(
    model: "Model", prepared: "Prepared", config: "EvalConfig", with_baselines: bool
) -> tuple["EvalResult", dict[str, dict[str, float]]]:
    """Scores the held-out split of every source that has one."""
    from llm_jax.data.shards import HELDOUT, TRAIN
    from llm_jax.eval.windows import corpus_from_split

    splits = {n: s for n, s in prepared.sources.items() if s[HELDOUT].num_documents}
    if not splits:
        raise DataError(f"{prepared.folder}: no source has held-out documents; prepare some")
    corpora = {
        name: corpus_from_split(split[HELDOUT], model.tokenizer, config)
        for name, split in splits.items()
    }
    result = evaluate(model, corpora, config)
    baselines: dict[str, dict[str, float]] = {}
    if with_baselines and any(corpus.scored is not None for corpus in corpora.values()):
        raise ConfigError(
            f"--baselines: {prepared.folder} holds conversations, of which only answers are scored; leave it out"
        )
    for name, split in splits.items() if with_baselines else ():
        heldout = corpus_texts(model, corpora[name])
        train = split_texts(model, split[TRAIN], TRIGRAM_CHARACTERS)
        baselines[name] = measure_baselines(heldout, train)
    return result, baselines


def evaluate_texts(
    model: "Model", specs: Sequence[str], config: "EvalConfig", with_baselines: bool
) -> tuple["EvalResult", dict[str, dict[str, float]]]:
    """Scores all documents of the given sources."""
    from llm_jax.data.sources import Rejects, parse_source_spec, read_documents
    from llm_jax.eval.windows import corpus_from_texts

    corpora: dict[str, Corpus] = {}
    for spec in specs:
        source, rejects = parse_source_spec(spec), Rejects()
        if source.name in corpora:
            raise ConfigError(f"--text: two sources are named {source.name!r}; write NAME=PATH")
        texts = [document.text for document in read_documents(source, rejects)]
        rejects.check(source.name, max_fraction=0.001)
        corpora[source.name] = corpus_from_texts(texts, model.tokenizer, config)
    result = evaluate(model, corpora, config)
    names = corpora if with_baselines else ()
    return result, {n: measure_baselines(corpus_texts(model, corpora[n]), []) for n in names}


def evaluate(model: "Model", corpora: "dict[str, Corpus]", config: "EvalConfig") -> "EvalResult":
    """One pass over all sources."""
    from llm_jax.eval.perplexity import Evaluator

    return Evaluator(model.config, corpora, config).evaluate(model.params)


def corpus_texts(model: "Model", corpus: "Corpus") -> list[str]:
    """The scored texts themselves."""
    bounds = zip(corpus.starts[:-1], corpus.starts[1:], strict=True)
    return [model.tokenizer.decode(corpus.ids[a + 1 : b].tolist()) for a, b in bounds]


def split_texts(model: "Model", split: "Split", limit: int) -> list[str]:
    """Documents of a split up to about `limit` characters, evenly spaced when that is not all."""
    share = min(1.0, limit / max(split.num_characters, 1))
    count = math.ceil(split.num_documents * share)
    chosen = [index * split.num_documents // count for index in range(count)]
    return [model.tokenizer.decode(split.document(index).tolist()) for index in chosen]


def measure_baselines(heldout: Sequence[str], train: Sequence[str]) -> dict[str, float]:
    """Bits per character of what needs no neural network; with training text, also having seen it."""
    from llm_jax.eval.baselines import CharacterTrigram, xz_bits_per_character

    texts = list(up_to(heldout, HELDOUT_CHARACTERS))
    found = {"xz": xz_bits_per_character(texts)}
    if train:
        primer = list(up_to(train, PRIMER_CHARACTERS))
        found["xz_primed"] = xz_bits_per_character(texts, primer)
        found["trigram"] = CharacterTrigram(train).bits_per_character(texts)
    return found


def up_to(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first texts, the last cut, that make `limit` characters."""
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


def make_tables(result: "EvalResult", baselines: dict[str, dict[str, float]]) -> list[Table]:
    """What was measured and per token; and per character, which other tokenizers may be compared with."""
    extra = list(dict.fromkeys(name for found in baselines.values() for name in found))
    per_token = _table("documents", "tokens", "bytes", "characters", "nats/token", "PPL")
    per_character = _table("bits/byte", "bits/char", "95 % interval", *extra)
    for source, score in {**result.sources, "total": result.total}.items():
        counts = (score.documents, score.tokens, score.bytes, score.characters)
        low, high = score.bits_per_character_interval
        per_token.add_row(
            source,
            *(f"{count:,}" for count in counts),
            f"{score.nats_per_token:.4f}",
            f"{score.perplexity:,.2f}",
        )
        per_character.add_row(
            source,
            f"{score.bits_per_byte:.4f}",
            f"{score.bits_per_character:.4f}",
            f"{low:.3f} - {high:.3f}" if math.isfinite(low) else "one document",
            *(f"{baselines[source][n]:.4f}" if source in baselines else "" for n in extra),
        )
    return [per_token, per_character]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("source", no_wrap=True)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    return table


def beside(checkpoint: Path) -> Path:
    """`eval.json` in the run folder of a checkpoint, or next to an imported model's record."""
    in_run = checkpoint.parent.name == "checkpoints"
    return (checkpoint.parent.parent if in_run else checkpoint) / "eval.json"


def finite(value: Any) -> Any:
    """The same JSON value with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    cli.leave(cli.run(main))
