"""The way of a request: plan, batch, forward, sample, commit."""
