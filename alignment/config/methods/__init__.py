"""The `algorithm` sections of the built-in methods, one file a method. Nothing imports torch."""
