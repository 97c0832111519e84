"""Export a run: a merged checkpoint, a PEFT adapter or a client's smaller model, each with a model card.

`merged`, `adapter` and `personal` work on a model in memory; `run` reads a run folder and writes one of these forms.
"""
