"""Devices on machines of their own: the commands `serve`, `invite` and `join`, around Flower's SuperLink and SuperNode.

Flower carries and secures every message. Here is what an operator would otherwise do by hand: certificates, a roster,
processes that are started and looked after, and a check before anything is trained.
"""
