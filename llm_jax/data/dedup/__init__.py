"""Documents that are there twice, exactly or nearly; and those that hold an evaluation set.

shingles       a text without case, spaces and punctuation, and hashes of its pieces
minhash        a signature whose agreement estimates the Jaccard similarity of two texts
index          signatures on disk; pairs by banding; clusters; in bounded memory
stage          sources -> sources without repeats
contamination  n-grams shared with an evaluation set; the stage that takes such documents out
"""
