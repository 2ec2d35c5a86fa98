"""Anthropic's Messages API as a thin layer over chat: blocks become chat messages, neutral events become blocks."""
