"""Task evaluations: what reuse does to the answers of teams on public data sets."""
