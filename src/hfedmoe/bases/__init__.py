"""Base models for experiments, built here from packaged models and texts, with experts that differ by domain.

Experts of ordinary MoE models specialise by token, so it hardly matters which of them a client holds, and methods that
choose experts cannot be told apart. These bases have experts that belong to domains; `checks` measures how much.
"""
