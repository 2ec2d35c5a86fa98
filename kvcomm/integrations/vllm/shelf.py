from __future__ import annotations


def open_shelf(settings, config, model, engine, probe):
    return None
