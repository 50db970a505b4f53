"""Post-training alignment: pluggable trainers over one scorer, one rollout engine and one loop."""

__version__ = "0.1.0"
