"""The grid is a table and has no claims."""

MECHANISMS = ()
CLAIMS = ()
