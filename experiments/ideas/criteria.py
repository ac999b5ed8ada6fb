"""The digest has a judgement for each idea and no claims of a paper."""

MECHANISMS = ()
CLAIMS = ()
