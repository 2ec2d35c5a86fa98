"""What serves comparison only: other ways to reuse, timings, the load generator. No request comes through here."""
