"""Moving a span of KV and correcting it by the weighted offsets of anchors."""
