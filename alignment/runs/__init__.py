"""What a run leaves on disk, and how it is read back.

This package imports nothing by itself, so that `align verify` and the recipe checks stay quick:
`alignment.runs.expect` and everything it needs work without torch.
"""
