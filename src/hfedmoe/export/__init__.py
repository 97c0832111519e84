"""Results that leave the house: a merged checkpoint, a PEFT adapter, a client's own smaller model, each with a card.

`merged`, `adapter` and `personal` work on a model in memory; `run` reads a run folder and writes one of them.
"""
