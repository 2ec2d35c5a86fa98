"""The Responses API as a thin layer over chat: requests become chat requests, neutral events become items and events.

A stored response is a context: see `keeping`.
"""
