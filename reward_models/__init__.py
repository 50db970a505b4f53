"""Everything that scores a completion: verifiers for mathematics and procedural tasks, format,
length, pattern and sentiment rewards. Each is registered as a plug-in of kind "reward"."""
