"""What a package of plug-ins looks like: plain classes and functions, announced by entry points."""
