"""The first config of a new user: `hfedmoe init` looks at rows and a model and writes one that runs.

`rows` reads the files and `columns` says what their columns are. `first` puts the sections in order: `data_section`,
`prompts` with `words` for labels that the tokenizer tells apart, and `federation` with the numbers of `sizes` and what
fits into this `machine`. `draft` writes the TOML.
"""
