"""The forgetting guard that goes on: when it gives the old language a larger share. Runs: test_continuation."""

import json

import pytest

from llm_jax.data.mixture import DataConfig
from llm_jax.data.phases import Phase
from llm_jax.data.weights import SourceWeight
from llm_jax.errors import ConfigError
from llm_jax.run.rebalance import Guard, decide, what_next
from llm_jax.train import ForgettingConfig

CONFIG = ForgettingConfig(sources=("en",), action="rebalance", factor=2.0, max_share=0.5)
SHARES = {"en": 0.2, "zh": 0.8}


def weights(**shares: float) -> tuple[SourceWeight, ...]:
    return tuple(SourceWeight(name=name, weight=weight) for name, weight in shares.items())


def test_within_the_bound_nothing_happens():
    assert decide(Guard(), CONFIG, SHARES, {}, 10) == Guard()


def test_beyond_the_bound_the_share_grows_from_the_next_step_on():
    guard = decide(Guard(), CONFIG, SHARES, {"en": 3.0}, 10)
    assert guard.phases == (Phase(from_step=10, sources=weights(en=0.4, zh=0.6)),)
    assert what_next(Guard(), guard) == "the shares from here on are en 40.0%, zh 60.0%"


def test_what_gets_better_is_waited_for_and_what_does_not_gets_more_up_to_the_bound():
    first = decide(Guard(), CONFIG, SHARES, {"en": 3.0}, 10)
    waiting = decide(first, CONFIG, {"en": 0.4, "zh": 0.6}, {"en": 2.9}, 20)
    assert waiting.phases == first.phases
    assert "better" in what_next(first, waiting)
    more = decide(waiting, CONFIG, {"en": 0.4, "zh": 0.6}, {"en": 2.95}, 30)
    assert more.phases[1:] == (Phase(from_step=30, sources=weights(en=0.5, zh=0.5)),)
    end = decide(more, CONFIG, {"en": 0.5, "zh": 0.5}, {"en": 2.96}, 40)
    assert end.ended
    assert what_next(more, end) == ""


def test_gone_on_after_its_end_under_another_bound_the_guard_judges_anew():
    ended = Guard(beyond={"en": 2.96}, ended=True)
    better = decide(ended, CONFIG, {"en": 0.5, "zh": 0.5}, {"en": 2.9}, 50)
    assert "better" in what_next(ended, better)
    grown = decide(ended, CONFIG, SHARES, {"en": 3.0}, 50)
    assert what_next(ended, grown).startswith("the shares from here on are")


def test_another_source_beyond_the_bound_is_not_better():
    config = ForgettingConfig(sources=("en", "fr"), action="rebalance")
    shares = {"en": 0.1, "fr": 0.1, "zh": 0.8}
    first = decide(Guard(), config, shares, {"en": 3.0}, 10)
    second = decide(first, config, shares, {"en": 2.0, "fr": 4.0}, 20)
    assert len(second.phases) == 2


def test_a_phase_that_was_decided_is_not_decided_again():
    first = decide(Guard(), CONFIG, SHARES, {"en": 3.0}, 10)
    resumed = Guard(phases=first.phases)  # from a checkpoint before it
    assert decide(resumed, CONFIG, {"en": 0.4, "zh": 0.6}, {"en": 3.0}, 10) == first


def test_a_guard_is_the_same_after_a_record_and_joins_what_was_planned():
    guard = decide(Guard(), CONFIG, SHARES, {"en": 3.0}, 10)
    assert Guard.of_record({"guard": json.loads(json.dumps(guard.to_record()))}) == guard
    planned = Phase(from_step=30, sources=weights(zh=1.0))
    data = guard.applied(DataConfig(prepared="x", phases=(planned,)))
    assert data.phases == (*guard.phases, planned)
    assert guard.applied(data) == data


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"action": "balance"}, "forgetting.action='balance'; "),
        ({"action": "rebalance"}, "needs forgetting.sources"),
        ({"factor": 1.0}, "forgetting.factor=1.0 must be above 1"),
        ({"max_share": 1.0}, "forgetting.max_share=1.0 must be between 0 and 1"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        ForgettingConfig(**settings)
    assert "\n" not in str(error.value)
