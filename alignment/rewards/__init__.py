"""Rewards: the protocol, their composition, and shaping by length and ending.

Import from the modules: `protocol`, `compose`, `shaping`. A reward needs only `protocol`, which
loads next to nothing.
"""
