"""Recipes shipped with the toolkit: `align train MODEL/METHOD` finds them here by name.

One folder per model and one YAML file per run. `accelerate/` holds launch configurations for
`accelerate launch`, which are not recipes.
"""
