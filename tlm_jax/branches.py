"""Document ids of branching documents.

A token of document id d sees the tokens of document d before it. A token of document id
d + b * BRANCH belongs to branch b of document d: it sees those, the document's trunk,
and what its own branch has before it, but no other branch. So continuations of one
text can be read in one row. Ids of ordinary documents lie below BRANCH.
"""

BRANCH = 1 << 20
