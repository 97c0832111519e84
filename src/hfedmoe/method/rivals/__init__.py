"""Methods of others, one per file: each is a `Method`, and a row of `method.methods.METHODS`.

What a paper leaves open is decided where it is used, marked Decision.
"""
