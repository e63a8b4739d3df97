"""`data beam` where Apache Beam is not installed; what it does with it is in tests/data/cluster."""

import importlib.util

import pytest

from llm_jax.run import cli, data


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is here")
def test_without_the_extra_the_command_says_what_to_install(capsys, tmp_path, tiny_tokenizer):
    words = ["beam", "--source", "sample:zh", "--tokenizer", str(tiny_tokenizer)]
    capsys.readouterr()
    assert cli.run(data.main, [*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "error: data beam needs Apache Beam; pip install 'llm-jax[beam]'\n"
    assert list(tmp_path.iterdir()) == []
