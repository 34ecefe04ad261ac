"""The jobs: each reads like a table of contents; what they do is in `ais`."""
