"""The log of answers: torn, damaged, of other requests, and answers that belong together."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llm_jax.errors import CheckpointError
from llm_jax.instruct.self_instruct import Answer, Request
from llm_jax.instruct.self_instruct.request_log import NAME, RequestLog

REQUESTS = [
    Request(key=f"zh/0/class/{n:02d}", prompt=f"问{n}", max_tokens=4, temperature=0.0, top_p=1.0,
            stop=("\n",), seed=n)
    for n in range(5)
]  # fmt: skip


class Counting:
    """Answers in groups, and remembers what it was asked."""

    def __init__(self, together: int = 1) -> None:
        self.together = together
        self.asked: list[str] = []

    def describe(self) -> dict:
        return {}

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Answer]]:
        for first in range(0, len(requests), self.together):
            group = requests[first : first + self.together]
            self.asked += [r.key[-2:] for r in group]
            # what a row gets depends on where it stands, as in a batch of our sampler
            yield [
                Answer(key=r.key, text=f"{r.prompt}答\u2028{n}", finished="stop")
                for n, r in enumerate(group)
            ]


def ask(folder: Path, generator: Counting, count: int = 5) -> list[str]:
    log = RequestLog(folder, lambda: None)
    try:
        return [answer.text for answer in log.ask(REQUESTS[:count], generator)]
    finally:
        log.close()


def test_cut_anywhere_in_a_line_the_log_gives_the_same_answers_and_asks_for_what_is_lost(tmp_path):
    path = tmp_path / NAME
    expected = ask(tmp_path, Counting())
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for size in [last - 1, *range(last, len(whole), 11), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:size])
        generator = Counting()
        assert ask(tmp_path, generator) == expected
        assert path.read_bytes() == whole
        lost = 2 if size < last else 1 if size < len(whole) else 0
        assert generator.asked == ["03", "04"][2 - lost :]


@pytest.mark.parametrize("kept", range(6))
def test_answers_that_belong_together_are_asked_for_together_again(tmp_path, kept):
    expected = ask(tmp_path, Counting(together=3))
    path = tmp_path / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]))
    generator = Counting(together=3)
    assert ask(tmp_path, generator) == expected
    assert (
        generator.asked
        == [["00", "01", "02", "03", "04"], ["03", "04"], []][(kept >= 3) + (kept == 5)]
    )
    assert len({json.loads(line)["key"] for line in path.read_bytes().splitlines()}) == 5


@pytest.mark.parametrize(
    "change", ["a flipped bit", "a line twice", "no JSON", "no object", "another field"]
)
def test_damage_is_named_by_its_line(tmp_path, change):
    ask(tmp_path, Counting())
    path = tmp_path / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    row = json.loads(lines[2])
    lines[2] = {
        "a flipped bit": lines[2].replace("问2".encode(), "问3".encode()),
        "a line twice": lines[1],
        "no JSON": lines[2][5:],
        "no object": b"[]\n",
        "another field": json.dumps({**row, "more": 1}).encode() + b"\n",
    }[change]
    path.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match=f"{NAME}:3: "):
        ask(tmp_path, Counting())


def test_an_answer_to_another_request_is_refused(tmp_path):
    ask(tmp_path, Counting())
    log = RequestLog(tmp_path, lambda: None)
    other = dataclasses.replace(REQUESTS[1], prompt="another")
    with pytest.raises(CheckpointError, match="zh/0/class/01 was asked otherwise"):
        log.ask([REQUESTS[0], other], Counting())
    log.close()


def test_nothing_is_written_once_the_lock_is_lost(tmp_path):
    def lost() -> None:
        raise CheckpointError("taken over")

    log = RequestLog(tmp_path, lost)
    with pytest.raises(CheckpointError, match="taken over"):
        log.ask(REQUESTS, Counting())
    log.close()
    assert (tmp_path / NAME).read_bytes() == b""
