"""The stages of one machine as one Apache Beam pipeline: the same functions, the same shards.

stage       what is asked for, the launch, the manifest     pipeline    raw files -> shards, on one page
units       what one worker reads, and where it is          reading     documents through the rules and the language
repeats     exact and near repeats                          components  clusters of near repeats
holdout     train or held out, as one machine deals them    writing     shards in order, and what was found out
tally       counts and first samples that can be merged

Needs the extra `llm-jax[beam]`. Order is carried by a key of bytes that every document has, so the result
depends on neither the runner nor the number of its workers.
"""
