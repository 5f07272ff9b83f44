"""`make compat`: the ecosystem's own tests, fetched when it runs, against this service."""
