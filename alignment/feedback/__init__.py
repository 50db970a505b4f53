"""Feedback by language models: replies from a local model or an endpoint, preferences between
answers, critiques and revisions by a constitution."""
