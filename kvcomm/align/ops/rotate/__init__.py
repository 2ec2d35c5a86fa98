"""Moving a span of KV: keys are turned to their new positions, values are copied."""
