"""Text -> packed batches. No jax here, so worker processes start fast.

documents      a document, and the account of records that could not become one
sources        which files hold documents, in which format
text_files     plain text, JSON lines, the sample texts
records        whole records, for data that is more than one text
record_files   Parquet, ArrayRecord, TFDS
package_docs   English prose from the installed packages
characters     what kind of character each one is       language   told by scripts
clean/         the stage: documents worth training on, a reason for every other one
dedup/         the stage: no exact or near repeats; no evaluation sets
sift           stages that judge each document: language_stage, dedup/contamination
ngram_score    how like a reference a text is
document_files documents between two stages            lineage    manifests, followed back to raw text
ordered_pool   work in processes, results in order
prepare        the stage: documents -> token shards on disk
shard_writer   prepared data, written whole or not at all
shards         prepared data, read
packing        which pieces of documents make a row
permutation    a seeded shuffle that is never stored
weights        shares of the tokens, stated or by rule phases         other shares from a step on
interleave     which source row k comes from, across phases
mixture        the plan: row k of the run as a pure function of k
loader         batches read ahead, for one process of many
batch          what data/ hands to train/
"""
